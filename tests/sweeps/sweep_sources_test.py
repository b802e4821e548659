"""Data, models and the server's own training are shared by all points that may share them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_cases import CONFIGS, VOCAB, random_params

from fedqsn_jax.config.schema import Config, with_fields
from fedqsn_jax.data.population import Splits, from_host
from fedqsn_jax.generation.language_tasks import sequence_classification
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.problems.problem import Problem
from fedqsn_jax.problems.prompted import prompted_problem
from fedqsn_jax.sweeps import sources

ROWS = {"image": jnp.zeros((4, 2)), "label": jnp.zeros(4, jnp.int32)}


@pytest.fixture
def made(monkeypatch):
    """What was loaded and trained, in place of doing it: each a list of configurations."""
    made = SimpleNamespace(loaded=[], trained=[])

    def load_problem(settings):
        made.loaded.append(settings)
        clients = from_host(ROWS, jnp.array([0, 4]))
        return Problem(Splits(clients, ROWS, ROWS, 2), {"w": jnp.zeros(8)}, *[None] * 4)

    def prepare(config, problem):
        return SimpleNamespace(config=config, problem=problem, held_out=None)

    def train(self, training, problem):
        made.trained.append(training)
        return problem.params, 0.5

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
        ("fedsp.prompts", 3, 1, 1),
        ("pretraining.steps", 7, 1, 2),
        ("pretraining.batch_size", 8, 1, 2),
        ("evaluation.batch_size", 8, 1, 2),
        ("seed", 1, 2, 2),
        ("data.alpha", 1.0, 2, 2),
        ("model.hidden", (8,), 2, 2),
        ("client.dropout", 0.1, 2, 2),
        ("client.compute_dtype", "bfloat16", 2, 2),
        ("mask_per", "client", 1, 1),
        ("broadcast.every", 0, 1, 1),
        ("server.validation_rows", 2, 1, 2),
    ],
)
def test_what_is_made_anew(made, field, value, loaded, trained):
    chosen = {"broadcast.every": 0, "server.scale": 0.0}
    more = chosen if field == "server.validation_rows" else {}
    both = Config(), with_fields(Config(), {field: value} | more)
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
    assert [settings.seed for settings in made.loaded] == [0, 1, 2, 1]


@pytest.mark.usefixtures("quick_compilation")
def test_what_a_point_of_prompts_starts_from_is_its_own(monkeypatch):
    """Also what the server does after its own training, with settings of that."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (9, 6)), jnp.int32)
    rows = {"tokens": tokens, "label": tokens[:, 1] % 3}
    splits = Splits(from_host(rows, jnp.array([0, 9])), rows, rows, 3)
    loaded = []

    def load_problem(settings):
        loaded.append(settings)
        encoder, task = CONFIGS["bert"], sequence_classification()
        params = random_params(encoder)
        return prompted_problem(
            settings, settings.prompted, splits, encoder, params, Execution(), task
        )

    def prepare(config, problem):
        return SimpleNamespace(config=config, problem=problem, held_out=None)

    monkeypatch.setattr(sources, "load_problem", load_problem)
    monkeypatch.setattr(sources, "prepare", prepare)
    values = {"algorithm": "fedsp", "pretraining.steps": 0, "fedsp.distillation_steps": 2}
    configs = [
        with_fields(Config(), {**values, "pretraining.batch_size": count}) for count in (2, 5)
    ]

    def start(config, shared):
        return shared.start(shared.prepare(config)).params["auxiliary"]

    shared = sources.Sources()
    first, second = (start(config, shared) for config in configs)
    assert len(loaded) == 1
    jax.tree.map(np.testing.assert_array_equal, second, start(configs[1], sources.Sources()))
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    assert any((np.asarray(one) != np.asarray(other)).any() for one, other in leaves)
