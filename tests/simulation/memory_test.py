"""The estimate of memory, against what the compiled program says that it needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.benchmarks.workloads import make_population, make_workload, workload_config
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.trees import tree_bytes
from fedqsn_jax.host.devices import device_bytes
from fedqsn_jax.rounds.client_optimizer import unscheduled
from fedqsn_jax.simulation.memory import client_bytes, saved_activations


def test_bytes_of_a_tree():
    tree = {"a": jnp.zeros((3, 5)), "b": (jnp.zeros(7, jnp.int8), jax.random.key(0))}
    assert tree_bytes(tree) == 60 + 7 + 8
    assert tree_bytes(jax.eval_shape(lambda: tree)) == 75


def test_one_client_by_hand(model):
    """An MLP 6-10-8-3 and 5 rows: two tanh outputs, the head's input, the softmax."""
    batch = {"x": jnp.zeros((5, 6)), "label": jnp.zeros(5, jnp.int32)}
    parameters = 4 * (6 * 10 + 10 + 10 * 8 + 8 + 8 * 3 + 3)
    saved = saved_activations(model.apply_fn, classification(), model.params, batch)
    # At least the two tanh layers' outputs and the softmax, each once and at most four times.
    outputs = 4 * 5 * (10 + 8 + 3)
    assert outputs <= saved <= 4 * outputs + 4 * 5 * 6
    total = client_bytes(
        model.apply_fn, classification(), unscheduled(optax.adam(0.1)), model.params, batch
    )
    # Effective weights and gradient, Adam's two moments and its count, the batch.
    assert total == 4 * parameters + 4 + 5 * 6 * 4 + 5 * 4 + 2 * saved


@pytest.mark.parametrize("chunk", [1, 12])
def test_a_round_takes_what_is_estimated(chunk):
    data = make_population(clients=15, mean=30)
    config = workload_config("fedqsn", 15, 15, 1, chunk)
    cohort = dataclasses.replace(config.cohort, parallelism="vmap")
    config = dataclasses.replace(config, cohort=cohort)
    simulation, params, rows = make_workload("dense", config, data)
    assert simulation.choice.axis.chunk_size == chunk
    state = jax.eval_shape(simulation.federation.init, jax.random.key(0), params)
    last = jax.ShapeDtypeStruct((), np.int32)
    needs = simulation.run.lower(state, data, rows, last, last).compile().memory_analysis()
    # A donated state is argument and output in one.
    real = (
        needs.argument_size_in_bytes
        + needs.temp_size_in_bytes
        + needs.output_size_in_bytes
        - needs.alias_size_in_bytes
    )
    estimate = sum(simulation.memory.values())
    assert 0.9 * real <= estimate <= 1.3 * real
    assert needs.alias_size_in_bytes >= tree_bytes(params), "the state is donated"


def test_what_a_device_has():
    assert 2**28 < device_bytes() < 2**44
