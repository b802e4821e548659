"""Checkpoints: exact, atomic, in the background, and plain about what is wrong."""

import contextlib
import ctypes
import logging
import resource
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from flax import struct

from fedqsn_jax.checkpoint import CheckpointError, Checkpoints

HISTORY = [
    {"round": 5, "global/accuracy": 0.1 + 0.2, "visible": {"Dense_0/kernel": 17}, "note": None},
    {"round": 10, "global/accuracy": float("inf"), "views": [1e-300, "attacker_1", True]},
]


@struct.dataclass
class Server:
    params: Any
    optimizer_state: Any
    masks: dict[str, Any]
    pair: tuple[Any, ...]
    secret_key: jax.Array
    client_keys: jax.Array
    name: str = struct.field(pytree_node=False, default="digits")


def make_server(seed: int = 0) -> Server:
    key = jax.random.key(seed)
    params = {
        "Dense_0": {
            "kernel": jax.random.normal(key, (64, 10)),
            "bias": jax.random.normal(key, (10,), jnp.bfloat16),
        }
    }
    return Server(
        params=params,
        optimizer_state=optax.chain(optax.adamw(1e-3), optax.trace(0.9)).init(params),
        # Names as mask sites have them, and some that a file system might mind.
        masks={
            "Dense_0/kernel": jax.random.bernoulli(key, 0.5, (1, 10)),
            "a.b ü": jax.random.bits(key, (7, 3), jnp.uint8),
        },
        pair=(jnp.int32(-3), (), jnp.zeros((0, 4), jnp.bfloat16), None),
        secret_key=key,
        client_keys=jax.random.split(jax.random.key(seed, impl="rbg"), (2, 3)),
    )


def to_bytes(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Everything about every leaf, bit for bit, so that NaN equals itself."""
    facts = []
    for leaf in jax.tree.leaves(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        facts.append((str(leaf.dtype), leaf.shape, data.tobytes()))
    return facts


def weights(value: float, size: int = 3) -> dict[str, jax.Array]:
    return {"weights": jnp.full(size, value, jnp.float32)}


def noise(size: int = 1 << 18) -> dict[str, jax.Array]:
    """Does not compress, so that it takes its time and its space on disk."""
    return {"weights": jax.random.normal(jax.random.key(0), (size,))}


def assert_one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_round_trip_is_exact(tmp_path):
    server = make_server()
    with Checkpoints(tmp_path / "run", keep_latest=2, keep_best=1) as checkpoints:
        checkpoints.save(10, server, HISTORY, score=0.5)
    with Checkpoints(tmp_path / "run", keep_latest=2, keep_best=1) as checkpoints:
        assert checkpoints.latest_round() == 10
        restored, history = checkpoints.restore(jax.eval_shape(lambda: make_server(1)))
    assert jax.tree.structure(restored) == jax.tree.structure(server)
    assert to_bytes(restored) == to_bytes(server)
    assert history == HISTORY
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    np.testing.assert_array_equal(
        jax.random.bits(restored.client_keys[1, 2], (5,)),
        jax.random.bits(server.client_keys[1, 2], (5,)),
    )


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float32, jnp.uint32), (jnp.bfloat16, jnp.uint16)])
def test_every_bit_pattern_survives(tmp_path, dtype, bits):
    # Random bits hold NaN with payloads, infinities, subnormals and negative zeros.
    words = jax.random.bits(jax.random.key(0), (1 << 16,), bits)
    exponent = np.array([0x7F80_0001 >> (32 - 8 * words.dtype.itemsize), 0], words.dtype)
    words = jnp.concatenate([words, exponent, ~exponent])
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"x": jax.lax.bitcast_convert_type(words, dtype)}, [], score=0)
        like = {"x": jax.ShapeDtypeStruct(words.shape, dtype)}
        restored, _ = checkpoints.restore(like)
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(restored["x"], bits), words)


def test_restored_state_can_be_donated_and_saved_again(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep_latest=2, keep_best=0) as checkpoints:
        checkpoints.save(1, weights(1.0, 1000), [], score=0)
        restored, _ = checkpoints.restore(weights(0.0, 1000))
        checkpoints.save(2, step(restored), [], score=0)
        first, _ = checkpoints.restore(weights(0.0, 1000), round=1)
        second, _ = checkpoints.restore(weights(0.0, 1000), round=2)
    assert (first["weights"] == 1).all()
    assert (second["weights"] == 2).all()


def test_nothing_is_created_before_the_first_save(tmp_path):
    directory = tmp_path / "not" / "yet"
    with Checkpoints(directory, keep_latest=1, keep_best=1) as checkpoints:
        assert checkpoints.latest_round() is None
        with pytest.raises(CheckpointError, match="there is no checkpoint") as error:
            checkpoints.restore(weights(0.0))
        assert str(directory) in assert_one_line(error)
        checkpoints.wait()
    assert list(tmp_path.iterdir()) == []


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run", keep_latest=1, keep_best=1) as checkpoints:
        checkpoints.save(1, weights(1.0), [], score=0)
        assert checkpoints.restore(weights(0.0))[0]["weights"][0] == 1
    assert (tmp_path / "run" / "1").is_dir()


def test_the_latest_and_the_best_are_kept(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.3, 4: float("nan"), 5: 0.8, 6: 0.1, 7: float("nan"), 8: 0.0}
    kept = []
    for round, score in scores.items():
        # Anew for each: scores must survive the process.
        with Checkpoints(tmp_path, keep_latest=2, keep_best=2) as checkpoints:
            checkpoints.save(round, weights(round), [{"round": round}], score)
            kept.append(checkpoints.rounds())
    assert kept[:3] == [[1], [1, 2], [2, 3]]
    assert kept[3:] == [[2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 5, 6, 7], [2, 5, 7, 8]]
    with Checkpoints(tmp_path, keep_latest=2, keep_best=2) as checkpoints:
        best, history = checkpoints.restore(weights(0.0), round=2)
        assert best["weights"][0] == 2
        assert history == [{"round": 2}]
        with pytest.raises(CheckpointError, match=r"no checkpoint of round 3; .* 2, 5, 7, 8$"):
            checkpoints.restore(weights(0.0), round=3)


def test_only_the_latest_are_kept_where_no_best_is_wanted(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        for round in range(1, 5):
            checkpoints.save(round, weights(round), [], score=-round)
        assert checkpoints.rounds() == [4]


def test_a_round_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2, keep_best=0) as checkpoints:
        checkpoints.save(3, weights(1.0), [{"first": True}], score=0)
        checkpoints.save(3, weights(2.0), [{"first": False}], score=1)
    with Checkpoints(tmp_path, keep_latest=2, keep_best=0) as checkpoints:
        checkpoints.save(3, weights(3.0), [{"first": False}], score=2)
        state, history = checkpoints.restore(weights(0.0))
    assert (state["weights"] == 1).all()
    assert history == [{"first": True}]


def test_buffers_may_be_donated_and_the_history_may_grow_after_save(tmp_path):
    # 64 MB, so that the write goes on for long after save has returned.
    names = [f"w{index}" for index in range(4)]
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    state = {name: jnp.arange(1 << 22, dtype=jnp.float32) + 1 for name in names}
    history = [{"round": 1}]
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, state, history, score=0)
        assert not (tmp_path / "1").exists(), "save waited for the write"
        for _ in range(3):
            state = overwrite(state)
        history[0]["round"] = 2
        history.append({"round": 3})
        jax.block_until_ready(state)
        restored, stored_history = checkpoints.restore(state)
    expected = np.arange(1 << 22, dtype=np.float32) + 1
    for name in names:
        np.testing.assert_array_equal(restored[name], expected)
    assert stored_history == [{"round": 1}]


def test_memory_that_is_shared_with_the_host_is_copied(tmp_path):
    # No JAX program does this, but it shows whether anything still reads the state's own memory
    # after save has returned: write to it, which on a CPU its NumPy view allows to who insists.
    state = {f"w{index}": jnp.ones(1 << 22) for index in range(4)}
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, state, [], score=0)
        for leaf in state.values():
            view = np.asarray(leaf)
            ctypes.memset(view.ctypes.data, 0xFF, view.nbytes)
        restored, _ = checkpoints.restore(state)
    assert all((np.asarray(leaf) == 1).all() for leaf in restored.values())


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
        assert "File too large" in assert_one_line(error)
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


def test_nothing_is_printed_or_logged_even_at_verbosity_info(tmp_path, capfd, caplog):
    verbosity = absl_logging.get_verbosity()
    filters = list(absl_logging.get_absl_logger().filters)
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        with caplog.at_level(logging.INFO):
            with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
                for round in (1, 2):
                    checkpoints.save(round, weights(round), [], score=0)
                checkpoints.restore(weights(0.0))
                absl_logging.info("our own records pass")
            assert [record.getMessage() for record in caplog.records] == ["our own records pass"]
            assert absl_logging.get_absl_logger().filters == filters
            # Without us Orbax does log: the test above means something.
            from orbax.checkpoint import v1 as ocp

            ocp.training.Checkpointer(tmp_path).close()
            assert len(caplog.records) > 1
    finally:
        absl_logging.set_verbosity(verbosity)
    out, err = capfd.readouterr()
    assert out == ""
    assert "orbax" not in err.split("our own records pass")[0]
