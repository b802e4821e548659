"""Checkpoints that are damaged, interrupted or of another state: told plainly, in one line."""

import contextlib
import errno
import resource
import shutil

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import assert_one_line, noise, weights

from fedqsn_jax.host.checkpoints import CheckpointError, Checkpoints

MISMATCHES = {
    "shape": (
        lambda s: s["a"] | {"kernel": jnp.zeros((4, 2))},
        "a/kernel is stored as float32[3,2], but float32[4,2] is expected",
    ),
    "dtype": (
        lambda s: s["a"] | {"kernel": jnp.zeros((3, 2), jnp.bfloat16)},
        "a/kernel is stored as float32[3,2], but bfloat16[3,2] is expected",
    ),
    "missing": (
        lambda s: s["a"] | {"more": jnp.zeros(1)},
        "a/more is not stored, but float32[1] is expected",
    ),
    "superfluous": (
        lambda s: {"kernel": s["a"]["kernel"], "key": s["a"]["key"]},
        "a/bias is stored as float32[2], but not expected",
    ),
    "key of another kind": (
        lambda s: s["a"] | {"key": jax.random.key(0, impl="rbg")},
        "a/key is stored as key<fry>[], but key<rbg>[] is expected",
    ),
    "raw key": (
        lambda s: s["a"] | {"key": jax.random.PRNGKey(0)},
        "a/key is stored as key<fry>[], but uint32[2] is expected",
    ),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_another_structure_is_named(tmp_path, kind):
    change, message = MISMATCHES[kind]
    state = {
        "a": {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2)), "key": jax.random.key(0)},
        "z": jnp.zeros(3),
    }
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(5, state, [], score=0)
        with pytest.raises(CheckpointError) as error:
            # z differs too: the first difference is told.
            checkpoints.restore({"a": change(state), "z": jnp.zeros(4)})
    expected = message if kind != "superfluous" else "z is stored as float32[3], but float32[4]"
    assert assert_one_line(error).startswith(f"{tmp_path / '5'}: {expected}")
    if kind == "superfluous":
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore({"a": change(state), "z": state["z"]})
        assert assert_one_line(error) == f"{tmp_path / '5'}: {message}"


def _damage(step, what: str) -> None:
    if what == "empty":
        shutil.rmtree(step)
        step.mkdir()
    elif what == "truncated":
        for file in (step / "tensors").iterdir():
            file.write_text(file.read_text()[:-3])
    elif what == "other JSON":
        for file in (step / "tensors").iterdir():
            file.write_text("[1]")
    elif what == "overwritten data":
        for file in (step / "state").rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(b"\x00" * file.stat().st_size)
    elif (step / what).is_dir():
        shutil.rmtree(step / what)
    else:
        (step / what).unlink()


@pytest.mark.parametrize(
    "what",
    [
        *("empty", "state", "history", "tensors", "state/_METADATA", "state/manifest.ocdbt"),
        *("state/d", "truncated", "other JSON", "overwritten data", "_CHECKPOINT_METADATA"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_can_be_removed(tmp_path, capfd, what):
    with Checkpoints(tmp_path, keep_latest=2, keep_best=0) as checkpoints:
        checkpoints.save(5, weights(5.0, 1000), [{"round": 5}], score=0)
        checkpoints.save(10, weights(10.0, 1000), [{"round": 10}], score=0)
    _damage(tmp_path / "10", what)
    with Checkpoints(tmp_path, keep_latest=2, keep_best=0) as checkpoints:
        assert checkpoints.latest_round() == 10
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(weights(0.0, 1000))
        message = assert_one_line(error)
        assert message.startswith(f"{tmp_path / '10'}: this checkpoint cannot be read")
        assert message.endswith("move or remove that directory to resume from round 5")
        # As the message says.
        shutil.rmtree(tmp_path / "10")
        state, history = checkpoints.restore(weights(0.0, 1000))
        assert (state["weights"] == 5).all()
        assert history == [{"round": 5}]
        checkpoints.save(10, weights(11.0, 1000), [], score=0)
        assert (checkpoints.restore(weights(0.0, 1000))[0]["weights"] == 11).all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("item", ["state", "history"])
def test_a_single_changed_bit_is_noticed(tmp_path, item):
    """Also one after which everything still reads as numbers, which Orbax does not notice."""
    state = noise(1 << 12) | {"key": jax.random.key(0), "narrow": jnp.ones(3, jnp.bfloat16)}
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(5, state, [{"round": 5, "loss": 0.25}], score=0)
        checkpoints.restore(state)
        files = [path for path in (tmp_path / "5" / item).rglob("*") if path.is_file()]
        contents = {path: bytearray(path.read_bytes()) for path in files}
        if item == "history":
            file = next(path for path, data in contents.items() if b"0.25" in data)
            place = contents[file].index(b"0.25") + 3
        else:
            # Noise does not compress, so it is most of the largest file.
            file = max(contents, key=lambda path: len(contents[path]))
            place = len(contents[file]) // 2
        contents[file][place] ^= 1
        file.write_bytes(contents[file])
        for use in (lambda: checkpoints.restore(state), lambda: checkpoints.read("weights")):
            with pytest.raises(CheckpointError, match="its digest is not that of its") as error:
                use()
            assert assert_one_line(error).startswith(f"{tmp_path / '5'}: this checkpoint cannot")


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        checkpoints.save(5, weights(5.0), [], score=0.5)
    # Orbax's own name for a step that is being written, found here and not assumed.
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        checkpoints.save(10, noise(1 << 23), [], score=0.6)
        others: set[str] = set()
        while not others:  # The directory is made in the background too.
            others = {path.name for path in tmp_path.iterdir()} - {"5"}
    (unfinished,) = others
    assert unfinished != "10"
    # Killed at the last moment: all is written but the name. And killed early.
    (tmp_path / "10").rename(tmp_path / unfinished)
    early = tmp_path / unfinished.replace("10", "15")
    (early / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        assert checkpoints.latest_round() == 5
        assert (checkpoints.restore(weights(0.0))[0]["weights"] == 5).all()
        # A reader removes nothing: the save might be another process's.
        assert (tmp_path / unfinished).exists()
        checkpoints.save(10, weights(10.0), [], score=0.6)
        assert checkpoints.rounds() == [5, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5"]


def test_what_an_interrupted_deletion_left_is_removed(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        for round in (5, 10, 15):
            checkpoints.save(round, weights(round), [], score=round)
    shutil.copytree(tmp_path / "10", tmp_path / "3")
    shutil.rmtree(tmp_path / "3" / "metrics")
    (tmp_path / "3" / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        checkpoints.save(20, weights(20.0), [], score=20)
        assert checkpoints.rounds() == [15, 20]


@contextlib.contextmanager
def full_disk():
    """Lets no file grow beyond 64 KiB, which to a writer looks like a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_reported_once_and_later_saves_work(tmp_path, capfd):
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, weights(1.0), [], score=0)
        checkpoints.wait()
        with full_disk():
            checkpoints.save(2, noise(), [], score=0)
            with pytest.raises(CheckpointError, match="checkpoint of round 2 could not") as error:
                checkpoints.wait()
        # In words, or, of a newer TensorStore, by its number.
        line = assert_one_line(error)
        assert "File too large" in line or f"os_error_code='{errno.EFBIG}'" in line
        # Round 1 would have made room for round 2, which is not there.
        assert checkpoints.latest_round() == 1
        checkpoints.save(2, noise(), [], score=0)
        assert checkpoints.rounds() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert capfd.readouterr() == ("", "")


def test_a_save_that_fails_last_is_reported_on_leaving(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_latest=1, keep_best=0)
    with full_disk():
        checkpoints.save(2, noise(), [], score=0)
        with pytest.raises(CheckpointError, match="round 2 could not be written"):
            checkpoints.close()
    checkpoints.close()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file" / "run", keep_latest=1, keep_best=0) as checkpoints:
        assert checkpoints.latest_round() is None
        with pytest.raises(CheckpointError, match="round 1 could not be written") as error:
            checkpoints.save(1, weights(1.0), [], score=0)
        assert_one_line(error)


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path / "run", keep_latest=1, keep_best=0) as checkpoints:
        with pytest.raises(TypeError, match="a/rate is of type float; allowed are jax arrays"):
            checkpoints.save(1, {"a": {"rate": 0.1}}, [], score=0)
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, weights(1.0), [{"loss": jnp.float32(1)}], score=0)
        with pytest.raises(ValueError, match="two tensors of the state have the name a/b"):
            checkpoints.save(1, {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, [], score=0)
        with pytest.raises(ValueError, match="the state has no tensors to save"):
            checkpoints.save(1, {"a": (), "b": jnp.zeros((0, 3))}, [], score=0)
    assert not (tmp_path / "run").exists()


def test_a_dtype_that_cannot_be_stored_is_told_in_one_line(tmp_path, capfd):
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"codes": jnp.zeros(4, jnp.uint4)}, [], score=0)
        with pytest.raises(CheckpointError, match="uint4") as error:
            checkpoints.wait()
        assert_one_line(error)
        assert checkpoints.latest_round() is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["{", '{"score": 0.875}', "[]"])
def test_a_damaged_score_is_told_of_its_own_checkpoint_before_the_next_save(tmp_path, damage):
    """Orbax reads it at the next save, whose checkpoint would be blamed."""
    with Checkpoints(tmp_path, keep_latest=1, keep_best=1) as checkpoints:
        checkpoints.save(5, weights(5.0), [], score=0.75)
        checkpoints.save(10, weights(10.0), [], score=0.5)
    (file,) = (tmp_path / "5" / "metrics").glob("metrics")
    file.write_text(damage)
    with Checkpoints(tmp_path, keep_latest=1, keep_best=1) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(weights(0.0))
        message = assert_one_line(error)
        assert message.startswith(f"{tmp_path / '5'}: its score cannot be read")
        # As the message says.
        shutil.rmtree(tmp_path / "5")
        state, history = checkpoints.restore(weights(0.0))
        checkpoints.save(15, state, history, score=0.5)
        assert checkpoints.latest_round() == 15
