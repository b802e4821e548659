"""Rounds on meshes of virtual devices, as a program of its own: ``mesh_cases.py OUT.json``.

The number of devices is fixed when JAX starts, so `mesh_test` runs this in a process that has
several. It writes what it found; the test judges.
"""

import json
import sys

import jax
import numpy as np

from fedqsn_jax.benchmarks.measuring import timed_calls
from fedqsn_jax.benchmarks.workloads import make_population, make_workload, workload_config
from fedqsn_jax.config.schema import resolve
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.data.population import from_clients
from fedqsn_jax.data.streamed import HostData
from fedqsn_jax.simulation.compose import make_simulation
from fedqsn_jax.simulation.running import initial_state, place, run_rounds

SIZES = (7, 0, 12, 3, 9, 1, 20, 4, 5)
ROUNDS = 2


def apply_fn(params, batch, key):
    del key
    hidden = jax.numpy.tanh(batch["x"] @ params["hidden"]["kernel"])
    return hidden @ params["head"]["kernel"]


def make_clients(random):
    return from_clients(
        [
            {
                "x": random.normal(size=(rows, 6)).astype(np.float32),
                "label": random.integers(0, 3, rows).astype(np.int32),
            }
            for rows in SIZES
        ]
    )


def make(parallelism, devices, chunk, host_resident=False):
    """A simulation with its first parameters and data."""
    random = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": random.normal(0, 0.4, (6, 10)).astype(np.float32)},
        "head": {"kernel": random.normal(0, 0.4, (10, 3)).astype(np.float32)},
    }
    params = jax.tree.map(jax.numpy.asarray, params)
    data = make_clients(random)
    if host_resident:
        arrays = {name: np.asarray(array) for name, array in data.examples.items()}
        data = HostData(arrays, np.asarray(data.offsets, np.int64))
    config = resolve(
        {
            "rounds": ROUNDS,
            "rounds_per_call": 1,
            "cohort": {
                "size": 7,
                "parallelism": parallelism,
                "devices": devices,
                "chunk_size": chunk,
            },
            "client": {"batch_size": 4, "learning_rate": 0.3},
            "participation": {"dropout": 0.2, "stragglers": 0.5, "nan": 0.2},
            "upload": {"bits": 3, "block_size": 4, "error_feedback": True},
            "evaluation": {"proxy_samples": 2, "attackers": (2,)},
            "data": {"clients": len(SIZES)},
        }
    )
    simulation = make_simulation(config, apply_fn, classification(), params, data)
    assert simulation.choice.axis.devices == max(devices, 1)
    assert simulation.choice.axis.chunk_size == max(chunk, 1)
    return simulation, params, data


def deltas_of_rounds(parallelism, devices, chunk, rounds=1):
    """What so many rounds add to the hidden model, after each of them."""
    simulation, params, data = make(parallelism, devices, chunk)
    state, data = initial_state(simulation, params), place(simulation, data)
    one_round = jax.jit(simulation.federation.round, donate_argnums=0)
    deltas = []
    for _ in range(rounds):
        state, _ = one_round(state, data)
        deltas.append(differences(state.params, params))
    return deltas


def differences(ours, theirs):
    return jax.tree.map(lambda new, old: (np.asarray(new) - np.asarray(old)).tolist(), ours, theirs)


def facts_of_two_calls(devices):
    """Whether a second call compiles, moves arrays or keeps what was donated."""
    simulation, params, data = make("mesh", devices, 1)
    state = first = initial_state(simulation, params)
    rows = {name: array[:10] for name, array in data.examples.items()}
    data, rows, one, two = place(
        simulation, (data, rows, jax.numpy.int32(1), jax.numpy.int32(ROUNDS))
    )
    state, _ = simulation.run(state, data, rows, one, two)
    donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    with jax.transfer_guard("disallow"):
        state, _ = simulation.run(state, data, rows, two, two)
        jax.block_until_ready(state)
    return {
        "round": int(state.round),
        "compilations": simulation.run._cache_size(),
        "donated": donated,
        "devices": len(state.params["head"]["kernel"].sharding.device_set),
    }


def streamed_calls(devices, chunk):
    """What two calls add to the hidden model, with rows that stay on the host."""
    simulation, params, data = make("mesh", devices, chunk, host_resident=True)
    state = initial_state(simulation, params)
    rows = {name: array[:10] for name, array in data.examples.items()}
    *_, (finished, last, _) = run_rounds(simulation, state, data, rows)
    assert finished == ROUNDS
    assert simulation.run._cache_size() == 1
    return differences(last.params, params)


def benchmarked(devices):
    """How often the benchmark's calls compile: the first one, and two more."""
    data = make_population(clients=2, mean=20)
    simulation, params, rows = make_workload("dense", workload_config("fedavg", 2, 2, 1), data)
    assert simulation.choice.axis.devices == devices
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append("backend_compile" in name)
    )
    running = timed_calls(simulation, params, data, rows)
    counts = []
    for _ in range(3):
        assert next(running) > 0
        counts.append(sum(compiled))
    return counts


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    first, second = deltas_of_rounds("scan", 0, 0, ROUNDS)
    deltas = {"one device": first}
    for devices, chunk in ((2, 2), (3, 1), (4, 2)):
        name = f"{devices} devices, {chunk} at once"
        (deltas[name],) = deltas_of_rounds("mesh", devices, chunk)
    found = {
        "deltas": deltas,
        "calls": facts_of_two_calls(4),
        "two rounds": {"one device": second, "streamed": streamed_calls(4, 2)},
        "benchmark": benchmarked(4),
    }
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
