"""A point of a sweep's compiled program is the same as the point run alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep_cases import CONFIG, sweep_file

from fedqsn_jax import load
from fedqsn_jax.cli import main, sweep
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import OPTIMIZERS, SERVER_OPTIMIZERS, with_fields
from fedqsn_jax.data.streamed import HostData
from fedqsn_jax.problems.training import local_optimizer
from fedqsn_jax.protocol.proxy import chain, client_mask, effective_params, server_mask, whole_proxy
from fedqsn_jax.protocol.sites import find_sites
from fedqsn_jax.runs.experiment import prepare
from fedqsn_jax.simulation.from_config import server_optimizer
from fedqsn_jax.sweeps.grid import program_of
from fedqsn_jax.sweeps.program import Program, settings_at_once
from fedqsn_jax.sweeps.results import SweepDirectory
from fedqsn_jax.sweeps.sources import Sources

BASE = read_config(CONFIG[0].removeprefix("--config="), CONFIG[1:])
VALUES = (
    {"p1": 0.3, "p2": 0.0, "client.learning_rate": 0.05, "server.learning_rate": 1.0, "seed": 1},
    {"p1": 0.0, "p2": 0.0, "client.learning_rate": 0.1, "server.learning_rate": 1.0, "seed": 0},
    {"p1": 0.0, "p2": 0.4, "client.learning_rate": 0.1, "server.learning_rate": 0.5, "seed": 0},
)
POINTS = [with_fields(BASE, values) for values in VALUES]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def assert_same_metrics(found, expected):
    names = set(expected) - {"seconds", "round"}
    assert names <= set(found)
    for name in names:
        assert found[name] == pytest.approx(expected[name], abs=1e-5, nan_ok=True), name


def test_a_point_is_the_same_side_by_side_in_turn_and_alone(tmp_path):
    assert len({program_of(config) for config in POINTS}) == 1
    experiments = [prepare(config) for config in POINTS]
    program = Program(experiments[0])
    sources = Sources()
    starts = [sources.start(experiment) for experiment in experiments]
    for _, state, entries in program.run_all(POINTS, starts):
        params, side_by_side = state.params, entries

    grids = [{name: [value] for name, value in values.items()} for values in VALUES]
    directory = tmp_path / "sweep"
    assert sweep.main([*CONFIG, sweep_file(tmp_path, grids), f"--workdir={directory}"]) == 0
    in_turn = {
        record["seed"] + record["settings"]["p2"]: record["metrics"]
        for record in SweepDirectory(directory).read()
    }
    for values, start, expected in zip(VALUES, starts, side_by_side, strict=True):
        metrics = in_turn[values["seed"] + values["p2"]]
        assert_same_metrics(metrics, expected)
        assert metrics["start/accuracy"] == pytest.approx(start.score)

    # Alone the values are built into the program, and zeros left out of it.
    own = [f"--config.{name}={value}" for name, value in VALUES[0].items()]
    assert main.main([*CONFIG, *own, f"--workdir={tmp_path / 'run'}"]) == 0
    trained = load(tmp_path / "run")
    assert_same_metrics(side_by_side[0], trained.history[-1])
    assert starts[0].score == pytest.approx(trained.history[0]["global/accuracy"])
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found[0], expected, atol=1e-5),
        params,
        trained.params,
    )


def test_seeds_that_hold_out_other_numbers_of_rows_are_side_by_side():
    """And the clients fail, and return quantized updates, as they do in a run alone."""
    options = {
        "data.held_out_share": 0.3,
        "data.held_out_clients": 2,
        "participation.dropout": 0.3,
        "participation.nan": 0.7,
        "client.proximal": 0.1,
        "upload.bits": 3,
        "upload.error_feedback": True,
        "evaluation.attackers": (),
        "rounds": 2,
    }
    configs = [with_fields(BASE, {**options, "p1": 0.2, "p2": 0.2, "seed": n}) for n in (0, 1)]
    experiments = [prepare(config) for config in configs]
    rows = {one.held_out.clients["own"].examples["label"].shape for one in experiments}
    assert len(rows) == 2
    program = Program(experiments[0])
    sources = Sources()
    starts = [sources.start(experiment) for experiment in experiments]
    for _, _, entries in program.run_all(configs, starts):
        side_by_side = entries
    for config, start, found in zip(configs, starts, side_by_side, strict=True):
        for _, _, entry in program.run_one(config, start):
            expected = entry
        assert {"own/global/accuracy", "new/proxy/accuracy_std"} <= set(expected)
        assert_same_metrics(found, expected)
    assert sum(entry["clients/rejected"] for entry in side_by_side) > 0


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed_count"])
def test_a_traced_probability_of_zero_hides_nothing(model, sampling):
    """Bit for bit what the chain gives from which the zeros are elided."""

    @jax.jit
    def effective(p1, p2):
        transform = chain(server_mask(p1, sampling), client_mask(p2, sampling))
        whole = whole_proxy(model.params, find_sites(model.params))
        secret = transform.init(jax.random.key(0), whole)
        proxy = transform.apply(jax.random.key(1), secret, transform.prepare(secret, whole))
        return effective_params(proxy), proxy.visible

    params, visible = effective(jnp.float32(0), jnp.float32(0))
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    assert visible
    assert all(np.all(each) for each in visible.values())
    # Nor does a trace change what is drawn.
    traced = effective(jnp.float32(0.3), jnp.float32(0.4))
    closed = jax.jit(lambda: effective.__wrapped__(0.3, 0.4))()
    jax.tree.map(np.testing.assert_array_equal, traced[1], closed[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), traced[0], closed[0])


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_every_server_optimizer_takes_a_traced_rate(name):
    def optimizer(rate):
        values = {"optimizer": name, "learning_rate": rate}
        return server_optimizer(with_fields(BASE.server, values), rounds=1)

    assert_same_step(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_local_optimizer_takes_traced_rates(name):
    def optimizer(rate):
        values = {"optimizer": name, "learning_rate": rate, "weight_decay": rate}
        return local_optimizer(with_fields(BASE.client, values))(jnp.int32(1))

    assert_same_step(optimizer)


def assert_same_step(make_optimizer):
    weights = jnp.arange(1, 7, dtype=jnp.float32).reshape(3, 2)

    def step(rate):
        optimizer = make_optimizer(rate)
        return optimizer.update(0.1 * weights, optimizer.init(weights), weights)[0]

    expected = jax.jit(lambda: step(0.3))()
    assert np.any(expected)
    np.testing.assert_allclose(jax.jit(step)(jnp.float32(0.3)), expected, rtol=1e-5)


def test_how_many_points_are_side_by_side():
    ready = prepare(BASE)
    simulation, problem = ready.simulation, ready.problem
    assert settings_at_once(simulation, problem, 48, "cpu") == 1
    assert settings_at_once(simulation, problem, 48, "gpu") == 48
    large = simulation._replace(memory={"all": 2**62})
    assert settings_at_once(large, problem, 48, "gpu") == 1
    busy = simulation._replace(choice=dataclasses.replace(simulation.choice, step_bytes=2**30))
    assert settings_at_once(busy, problem, 48, "gpu") == 2
    on_host = HostData({"label": np.zeros(3, np.int32)}, np.array([0, 1, 3]))
    splits = problem.splits._replace(clients=on_host)
    assert settings_at_once(simulation, problem._replace(splits=splits), 48, "gpu") == 1
