"""Rounds on meshes of virtual devices, as a program of its own: ``mesh_cases.py OUT.json``.

The number of devices is fixed when JAX starts, so `mesh_test` runs this in a process that has
several. It writes what it found; the test judges.
"""

import json
import sys

import jax
import numpy as np

from fedqsn_jax.config import resolve
from fedqsn_jax.data.federated import from_clients
from fedqsn_jax.running import initial_state, place
from fedqsn_jax.simulation import make_simulation
from fedqsn_jax.tasks import classification

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


def make(parallelism, devices, chunk):
    """A simulation with its first parameters and data."""
    random = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": random.normal(0, 0.4, (6, 10)).astype(np.float32)},
        "head": {"kernel": random.normal(0, 0.4, (10, 3)).astype(np.float32)},
    }
    params = jax.tree.map(jax.numpy.asarray, params)
    data = make_clients(random)
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


def delta_of_a_round(parallelism, devices, chunk):
    """What one round adds to the hidden model."""
    simulation, params, data = make(parallelism, devices, chunk)
    state, data = initial_state(simulation, params), place(simulation, data)
    state, _ = jax.jit(simulation.federation.round, donate_argnums=0)(state, data)
    return jax.tree.map(lambda new, old: (np.asarray(new) - old).tolist(), state.params, params)


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


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    deltas = {"one device": delta_of_a_round("scan", 0, 0)}
    for devices, chunk in ((1, 1), (2, 2), (3, 1), (4, 2)):
        deltas[f"{devices} devices, {chunk} at once"] = delta_of_a_round("mesh", devices, chunk)
    found = {"deltas": deltas, "calls": facts_of_two_calls(4)}
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
