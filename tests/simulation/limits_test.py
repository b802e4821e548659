"""What a device cannot hold is refused by shapes alone, and the setting is named."""

import jax
import jax.numpy as jnp
import pytest

from fedqsn_jax.config.schema import Config, ConfigError, resolve, with_fields
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.problems.problem import problem_settings
from fedqsn_jax.runs.experiment import load_problem, prepare
from fedqsn_jax.simulation.fitting import Model
from fedqsn_jax.simulation.limits import (
    check_evaluation,
    check_pretraining,
    check_trained_attackers,
)

GIB = 2**30


@pytest.fixture(autouse=True)
def twenty_gib(monkeypatch):
    for module in ("problems.limits", "simulation.client_run", "simulation.round_memory"):
        monkeypatch.setattr(f"fedqsn_jax.{module}.device_bytes", lambda: 20 * GIB)


def large(name):
    section, _, field = name.rpartition(".")
    values = {
        "lora.rank": 1_000_000,
        "model.hidden": (10_000_000, 10_000_000),
        "client.batch_size": 2_000_000_000,
        "pretraining.batch_size": 2_000_000_000,
        "evaluation.proxy_samples": 1_000_000_000,
        "rounds_per_call": 100_000_000,
    }
    return {section: {field: values[name]}} if section else {field: values[name]}


@pytest.mark.parametrize(
    "name",
    [
        "lora.rank",
        "model.hidden",
        "client.batch_size",
        "pretraining.batch_size",
        "evaluation.proxy_samples",
        "rounds_per_call",
    ],
)
def test_a_run_that_does_not_fit_names_its_setting(name, monkeypatch):
    config = resolve(large(name))
    # Nothing is computed: whoever asks for an initial value fails.
    monkeypatch.setattr("fedqsn_jax.problems.images.linen_init", _only_shapes)
    with pytest.raises(ConfigError, match=f"^{name} = .* GiB; allowed is less$"):
        prepare(config, load_problem(problem_settings(config), shapes=True))


def _only_shapes(module, key, batch):
    from fedqsn_jax.models.functional import linen_init

    assert isinstance(key, jax.core.Tracer)
    return linen_init(module, key, batch)


@pytest.mark.parametrize(
    "hidden", [(2_147_483_647, 2_147_483_647), (10_000_000,), (50_000, 20_000)]
)
def test_widths_of_any_size_are_refused(hidden):
    config = resolve({"model": {"hidden": hidden}})
    with pytest.raises(ConfigError, match=r"^model\.hidden = "):
        prepare(config, load_problem(problem_settings(config), shapes=True))


def test_what_fits_is_not_refused():
    config = resolve({"rounds": 1, "model": {"hidden": (8,)}})
    problem = load_problem(problem_settings(config), shapes=True)
    held = prepare(config, problem).simulation.held_bytes
    # The server's state: the model and a copy of each of two attackers; then the rows.
    parameters = 4 * (64 * 8 + 8 + 8 * 10 + 10)
    rows = (1797 - 360 - 200) * (4 * 64 + 4)
    assert 3 * parameters + rows < held < 3 * parameters + rows + 2000


def dense(width):
    """A model of one layer, whose only array is its outputs, and of no parameters to speak of."""

    def apply_fn(params, batch, key):
        return jnp.tanh(jnp.broadcast_to(params["w"], (len(batch["label"]), width)))

    shapes = {"w": jax.ShapeDtypeStruct((1, 1), jnp.float32)}
    return Model(apply_fn, apply_fn, classification(), shapes)


def rows(count):
    return {"label": jax.ShapeDtypeStruct((count,), jnp.int32)}


def test_evaluations_are_counted_up_to_the_rows_that_there_are():
    """Two arrays [rows, 2**20] of float32: 8 MiB a row, so that 2,560 rows take 20 GiB."""
    config = with_fields(Config(), {"evaluation.batch_size": 10**9})
    check_evaluation(config, dense(2**20), rows(2500), held=0)
    with pytest.raises(
        ConfigError, match=r"^evaluation\.batch_size = 1000000000: evaluations take"
    ):
        check_evaluation(config, dense(2**20), rows(2600), held=0)
    with pytest.raises(ConfigError, match=r"^model: it is too large: evaluations take about 21\.0"):
        check_evaluation(config, dense(1), rows(2), held=21 * GIB)


def test_attackers_that_train_must_fit():
    config = with_fields(Config(), {"client.batch_size": 10**9})
    with pytest.raises(ConfigError, match=r"^client.batch_size = 1000000000: the training of att"):
        check_trained_attackers(config, dense(2), rows(5), 0)
    check_trained_attackers(Config(), dense(2), rows(5), 0)


def test_without_pretraining_its_batch_may_be_of_any_size():
    config = with_fields(Config(), {"pretraining.batch_size": 10**9})
    check_pretraining(with_fields(config, {"pretraining.steps": 0}), dense(2), rows(5))
    check_pretraining(config, dense(2), rows(0))
    with pytest.raises(ConfigError, match=r"^pretraining.batch_size = 1000000000: the steps of"):
        check_pretraining(config, dense(2), rows(5))
