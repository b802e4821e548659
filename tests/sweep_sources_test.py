"""Data, models and the server's own training are shared by all points that may share them."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from fedqsn_jax.config import Config, with_fields
from fedqsn_jax.data.federated import Splits, from_host
from fedqsn_jax.problem import Problem
from fedqsn_jax.sweeps import sources

ROWS = {"image": jnp.zeros((4, 2)), "label": jnp.zeros(4, jnp.int32)}


@pytest.fixture
def made(monkeypatch):
    """What was loaded and trained, in place of doing it: each a list of configurations."""
    made = SimpleNamespace(loaded=[], trained=[])

    def load_problem(config):
        made.loaded.append(config)
        clients = from_host(ROWS, jnp.array([0, 4]))
        return Problem(Splits(clients, ROWS, ROWS, 2), {"w": jnp.zeros(8)}, *[None] * 4)

    def prepare(config, problem):
        return SimpleNamespace(config=config, problem=problem, held_out=None)

    def train(self, experiment):
        made.trained.append(experiment.config)
        return experiment.problem.params, 0.5

    monkeypatch.setattr(sources, "load_problem", load_problem)
    monkeypatch.setattr(sources, "prepare", prepare)
    monkeypatch.setattr(sources.Sources, "_train", train)
    return made


@pytest.mark.parametrize(
    ("field", "value", "loaded", "trained"),
    [
        ("p1", 0.5, 1, 1),
        ("algorithm", "fedsn", 1, 1),
        ("lora.rank", 4, 1, 1),
        ("client.learning_rate", 1.0, 1, 1),
        ("client.trained", ("head",), 1, 1),
        ("sites", "residual", 1, 1),
        ("rounds", 3, 1, 1),
        ("pretraining.steps", 7, 1, 2),
        ("seed", 1, 2, 2),
        ("data.alpha", 1.0, 2, 2),
        ("model.hidden", (8,), 2, 2),
        ("client.dropout", 0.1, 2, 2),
        ("client.compute_dtype", "bfloat16", 2, 2),
    ],
)
def test_what_is_made_anew(made, field, value, loaded, trained):
    both = Config(), with_fields(Config(), {field: value})
    shared = sources.Sources()
    for config in (*both, *both):
        shared.start(shared.prepare(config))
    assert (len(made.loaded), len(made.trained)) == (loaded, trained)


def test_the_oldest_are_dropped_beyond_a_limit(made):
    configs = [with_fields(Config(), {"seed": seed}) for seed in range(3)]
    # A problem takes 64 bytes: 32 of parameters, and three times 4 rows of 12 bytes, and offsets.
    shared = sources.Sources(kept_bytes=500)
    for seed in (0, 1, 0, 2, 0, 1):
        shared.prepare(configs[seed])
    assert [config.seed for config in made.loaded] == [0, 1, 2, 1]
