"""A working directory for a model of one's own: resumed, extended, loaded, refused to others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedqsn_jax import ConfigError, federate, load, nnx_update
from fedqsn_jax.cli.main import main
from fedqsn_jax.reporting.display import silent_display


class Network(nnx.Module):
    def __init__(self, width=8):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, width, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))


def rows(count):
    x = np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)
    return {"image": x, "label": x[:, :3].argmax(-1).astype(np.int32)}


CLIENTS, TEST = [rows(5), rows(8)], rows(9)
SHORT = {
    "private": rows(6),
    "client": {"steps": 1},
    "pretraining": {"steps": 1},
    "evaluation": {"proxy_samples": 2},
    "rounds_per_call": 1,
}
NOBODY = {"algorithm": "fedavg", "evaluation": {"attackers": ()}}
IN_DIRECTORY = {**SHORT, "checkpoint": {"every": 1}}


def quietly(model, *, test=TEST, **settings):
    """Progress is somebody else's, so nothing is shown."""
    return federate(model, CLIENTS, test, on_progress=lambda *told: None, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one round that was extended to two, and the same in one piece, without directory."""
    directory = tmp_path_factory.mktemp("own") / "run"
    told = []
    # Strict promotion of dtypes is for other programs of the user's.
    with jax.numpy_dtype_promotion("strict"):
        for rounds in (1, 2):
            result = federate(
                Network(),
                CLIENTS,
                TEST,
                rounds=rounds,
                workdir=directory,
                on_progress=lambda finished, entries: told.append(finished),
                **IN_DIRECTORY,
            )
    return directory, result, quietly(Network(), rounds=2, **SHORT), told


def without_times(history):
    return [{name: entry[name] for name in entry if name != "seconds"} for entry in history]


def test_a_run_in_parts_is_the_run_in_one_piece(finished):
    directory, result, in_one_piece, told = finished
    assert told == [1, 2]
    assert without_times(result.history) == without_times(in_one_piece.history)
    for index in "01":
        for name in ("bias", "kernel"):
            ours, theirs = (each.params["layers"][index][name] for each in (result, in_one_piece))
            np.testing.assert_array_equal(ours, theirs)
    written = {path.name for path in directory.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "accuracy.png"} <= written
    assert directory.stat().st_mode & 0o777 == 0o700


def test_what_was_trained_is_loaded_and_put_back(finished):
    directory, result, _, _ = finished
    trained = load(directory)
    assert trained.round == 2
    module = Network()
    nnx_update(module, trained.params)
    for index, layer in enumerate(module.layers):
        expected = result.params["layers"][str(index)]["kernel"]
        np.testing.assert_array_equal(layer.kernel[...], expected)
    again = quietly(Network(), rounds=0, params=trained.params, **NOBODY)
    # Round 0 of another run starts where this one ended.
    assert again.history[0]["global/loss"] == pytest.approx(result.history[-1]["global/loss"])


def test_the_directory_is_refused_to_others(finished, capsys):
    directory = finished[0]
    for change, message in (
        ({"model": Network(9)}, r"made with another model: layers/0/bias float32\[9\]"),
        ({"test": rows(10)}, "the rows are not those with which the run was begun"),
        ({"p1": 0.5}, r"made with another configuration: p1 = 0\.5 \(there: 0\.2\)"),
        ({"rounds": 1}, "rounds = 1: the run in .* has 2"),
    ):
        settings = {"model": Network(), "rounds": 2, **IN_DIRECTORY, **change}
        with pytest.raises(ConfigError, match=message):
            quietly(settings.pop("model"), workdir=directory, **settings)
    assert main(["--config=configs/digits.py", f"--workdir={directory}"]) == 2
    assert "its run is of a model of one's own, by federate" in capsys.readouterr().err


def test_checkpoints_need_a_directory():
    with pytest.raises(ConfigError, match=r"^checkpoint: of no use without workdir=DIRECTORY$"):
        federate(Network(), CLIENTS, TEST, checkpoint={"every": 1})
    with pytest.raises(ConfigError, match=r"^evaluation.fine_tuned_attackers: of no use without"):
        federate(Network(), CLIENTS, TEST, evaluation={"fine_tuned_attackers": 5})


def test_parameters_that_were_loaded_have_the_form_of_the_models_own():
    params = [jnp.ones((4, 8)), jnp.ones((8, 3))]

    def apply_fn(params, batch, key):
        return jnp.tanh(batch["image"] @ params[0]) @ params[1]

    start = {"0": jnp.zeros((4, 8)), "1": jnp.zeros((8, 3))}
    none = {"rounds": 0, **NOBODY}
    result = quietly((apply_fn, params), params=start, **none)
    assert isinstance(result.params, list)
    np.testing.assert_array_equal(result.params[1], np.zeros((8, 3)))
    with pytest.raises(ValueError, match=r"^params: PyTreeDef.*; allowed is the model's own"):
        quietly((apply_fn, params), params={"0": start["0"]}, **none)


def test_nothing_is_shown_where_progress_is_somebody_elses(finished, capsys):
    silent_display().message("nobody reads this")
    quietly(Network(), rounds=2, workdir=finished[0], **IN_DIRECTORY)
    assert capsys.readouterr().out == ""
