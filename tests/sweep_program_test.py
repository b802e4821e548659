"""A point of a sweep's compiled program is the same as the point run alone."""

import jax
import numpy as np
import pytest
from sweep_cases import CONFIG

from fedqsn_jax import load
from fedqsn_jax.command_line import read_config
from fedqsn_jax.config import Config, with_fields
from fedqsn_jax.experiment import prepare
from fedqsn_jax.main import main
from fedqsn_jax.simulation import TRACEABLE, initial_state, pretrain, run_rounds
from fedqsn_jax.sweeps.grid import program_of
from fedqsn_jax.sweeps.program import Program

BASE = read_config(CONFIG[0].removeprefix("--config="), CONFIG[1:])
POINTS = [
    with_fields(BASE, values)
    for values in (
        {"p1": 0.3, "p2": 0.4, "client.learning_rate": 0.05},
        {"p1": 0.0, "p2": 0.0, "seed": 1},
        {"p1": 0.0, "p2": 0.3, "server.learning_rate": 0.5, "seed": 2},
    )
]


def alone(config: Config):
    """Parameters and metrics of a run of its own, as `main` makes it, values in its program."""
    ready = prepare(config)
    simulation, splits = ready.simulation, ready.splits
    task = simulation.task
    params = pretrain(config, ready.pretraining_apply, task, ready.params, splits.private)
    state = initial_state(simulation, params)
    for _, after, entries in run_rounds(simulation, state, splits.clients, splits.test):
        state, latest = after, entries
    return state.params, latest[-1]


def assert_same(found, expected):
    (params, metrics), (own_params, own_metrics) = found, expected
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, own_params
    )
    names = set(own_metrics) - {"seconds"}
    assert names <= set(metrics)
    for name in names:
        assert metrics[name] == pytest.approx(own_metrics[name], abs=1e-5), name


@pytest.mark.usefixtures("quick_compilation")
def test_points_side_by_side_and_in_turn_are_as_alone(tmp_path):
    assert len({program_of(config) for config in POINTS}) == 1
    experiments = [prepare(config) for config in POINTS]
    program = Program(experiments[0])
    starts = [program.start(experiment) for experiment in experiments]
    for _, state, entries in program.run_all(POINTS, starts):
        together, metrics = state, entries
    found = [
        (jax.tree.map(lambda leaf, index=index: leaf[index], together.params), metrics[index])
        for index in range(len(POINTS))
    ]
    assert_same(found[0], alone(POINTS[0]))
    for _, state, entry in program.run_one(POINTS[2], starts[2]):
        in_turn = state.params, entry
    assert_same(in_turn, found[2])

    # The one without masks, whose own program leaves them out, through the front door.
    own = [f"--config.{name}={value}" for name, value in (("p1", 0.0), ("p2", 0.0), ("seed", 1))]
    assert main([*CONFIG, *own, f"--workdir={tmp_path / 'run'}"]) == 0
    trained = load(tmp_path / "run")
    assert_same(found[1], (trained.params, trained.history[-1]))


PAIRS = zip(
    ("sgd", "adagrad", "adam", "yogi", "lamb", "adafactor"), 3 * ("adam", "adamw"), strict=True
)


@pytest.mark.parametrize(("server", "client"), PAIRS)
def test_every_optimizer_takes_traced_rates(server, client):
    config = with_fields(BASE, {"server.optimizer": server, "client.optimizer": client})
    ready = prepare(config)
    program, splits = Program(ready), ready.splits
    arguments = {name: np.float32(0.1) for name in TRACEABLE}
    state = jax.eval_shape(program._init_one, arguments, jax.random.key(0), ready.params)
    stop = np.int32(2)
    after, _ = jax.eval_shape(
        program._advance_one, arguments, state, splits.clients, splits.test, stop, stop
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
