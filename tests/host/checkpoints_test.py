"""Checkpoints: exact, in the background, quiet, and as many as wanted."""

import ctypes
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from checkpoint_cases import assert_one_line, weights
from flax import struct

from fedqsn_jax.host.checkpoints import CheckpointError, Checkpoints

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
