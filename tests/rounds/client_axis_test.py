"""Cohorts, and the ways to run them: each client once, with its own number of steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.protocol.algorithms import fedqsn
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.upload import quantized_upload
from fedqsn_jax.rounds.aggregation import make_aggregator
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_axis import ClientAxis, ClientWork, sample_cohort, sum_over_clients
from fedqsn_jax.rounds.client_optimizer import unscheduled
from fedqsn_jax.rounds.evaluation import make_evaluator
from fedqsn_jax.rounds.federation import Evaluation, make_federation
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.rounds.participation import Participation

FAST = {"xla_backend_optimization_level": 0}
"""Most of these tests' time is compilation."""
KEY = jax.random.key(4)
POPULATION = 8


def fast(function):
    return jax.jit(function, compiler_options=FAST)


def octets(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_strategies_differ_by_rounding_only(model, data):
    """Invariant 5, with keys that matter in training, as with dropout; some clients fail."""

    def apply_fn(params, batch, key):
        outputs = model.apply_fn(params, batch, None)
        if key is None:
            return outputs
        word = jax.random.key_data(key)[0]
        return outputs * (1 + (word >> 31).astype(jnp.float32))

    task = classification()
    results, state = {}, None
    for axis in (ClientAxis(1), ClientAxis(3, refills=1), ClientAxis(POPULATION)):
        method = Method(
            transform=fedqsn(NormalFloat(2, 4), 0.3, 0.4).transform,
            update=make_client_update(apply_fn, task, unscheduled(optax.sgd(0.2)), 4, epochs=2),
            aggregator=make_aggregator(model.sites, optax.sgd(1.0)),
            sites=model.sites,
            participation=Participation(dropout=0.2, stragglers=0.5, nan=0.4),
            upload=quantized_upload(NormalFloat(3, 4), model.sites, feedback=True),
        )
        evaluation = Evaluation(
            make_evaluator(apply_fn, task, 16), task.score, proxy_samples=3, attackers=(1, 4)
        )
        federation = make_federation(
            method, evaluation, population=POPULATION, cohort=POPULATION
        ).with_client_axis(axis)
        state = state or fast(federation.init)(KEY, model.params)
        after, facts = fast(federation.round)(state, data)
        delta = jax.tree.map(
            lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64),
            after.params,
            state.params,
        )
        results[axis] = (
            leaves_by_path({"delta": delta, "kept": after.residuals}),
            facts,
            after.attackers,
        )
    expected, expected_facts, expected_attackers = results.pop(ClientAxis(1))
    # Client 1 has no rows, others have dropped out; some of the rest are broken.
    assert 0 < expected_facts["clients/rejected"] < expected_facts["clients/returned"] < 7
    for delta, facts, attackers in results.values():
        for path, leaf in delta.items():
            distance = np.linalg.norm(leaf - expected[path]) / np.linalg.norm(expected[path])
            assert distance <= 1e-5, path
        assert set(facts) == set(expected_facts)
        for name, value in facts.items():
            if name == "train/loss":
                np.testing.assert_allclose(value, expected_facts[name], rtol=1e-5)
            else:
                np.testing.assert_array_equal(value, expected_facts[name])
        assert octets(attackers) == octets(expected_attackers)


# What each client is: it counts its own starts, steps and their sum, and finishes.


def counting_work(ids):
    def one_hot(client):
        return (jnp.arange(10) == ids[client]).astype(jnp.int32)

    def start(context, client):
        return {"started": one_hot(client), "steps": jnp.int32(0), "sum": context}

    def step(context, client, index, carry):
        # A step that comes out of order, or under another client's name, poisons the sum.
        right = (index == carry["steps"]) & (one_hot(client) == carry["started"]).all()
        return {
            "started": carry["started"],
            "steps": carry["steps"] + 1,
            "sum": carry["sum"] + jnp.where(right, 1.0, jnp.nan),
        }

    def finish(context, client, carry):
        contribution = {
            "seen": carry["started"] * one_hot(client),
            "steps": carry["steps"] * one_hot(client),
            "sum": carry["sum"],
        }
        return contribution, {"id": ids[client], "steps": carry["steps"]}

    return ClientWork(start, step, finish)


IDS = jnp.int32([4, 9, 2, 7, 0, 5, 1])


@functools.cache
def counting_sum(axis):
    return fast(lambda steps: sum_over_clients(counting_work(IDS), jnp.float32(100), steps, axis))


@pytest.mark.parametrize(
    "axis",
    [ClientAxis(1), *(ClientAxis(chunk, refills) for chunk in (2, 3, 7) for refills in (0, 1))],
    ids=lambda axis: f"{axis.chunk_size}_{axis.refills}",
)
@pytest.mark.parametrize(
    "steps", [(3, 0, 8, 1, 8, 2, 0), (4,) * 7, (0,) * 7, (0, 0, 0, 9, 0, 0, 0)], ids=str
)
def test_each_client_is_counted_once_with_its_own_steps(axis, steps):
    total, kept = counting_sum(axis)(jnp.int32(steps))
    expected = np.zeros(10, int)
    expected[np.asarray(IDS)] = steps
    np.testing.assert_array_equal(total["steps"], expected)
    np.testing.assert_array_equal(total["seen"], expected > 0)
    np.testing.assert_array_equal(kept["steps"], steps)
    np.testing.assert_array_equal(kept["id"], np.where(np.array(steps) > 0, IDS, 0))
    assert float(total["sum"]) == 100 * np.count_nonzero(steps) + sum(steps)


@pytest.mark.parametrize("chunk", [2, 5, 7])
def test_equal_steps_may_be_said_beforehand(chunk):
    """The same sums, also with clients without rows."""
    steps = jnp.int32([4, 4, 0, 4, 4, 0, 4])
    total, kept = counting_sum(ClientAxis(chunk, steps=4))(steps)
    expected = np.zeros(10, int)
    expected[np.asarray(IDS)] = steps
    np.testing.assert_array_equal(total["steps"], expected)
    assert float(total["sum"]) == 100 * 5 + 4 * 5
    np.testing.assert_array_equal(kept["steps"], steps)


def test_a_place_that_is_free_does_not_wait_for_the_longest():
    """With 2 places 6 + 1 and 3 + 2 + 2 steps take 7 turns; sorted chunks would take 6 + 2 + 1."""
    steps, turns = jnp.int32([2, 6, 1, 3, 2]), []

    def step(context, client, index, carry):
        jax.debug.callback(lambda: turns.append(1))
        return carry

    work = ClientWork(lambda context, client: 0.0, step, lambda context, client, carry: (carry, ()))
    jax.block_until_ready(fast(lambda: sum_over_clients(work, None, steps, ClientAxis(2)))())
    jax.effects_barrier()
    assert len(turns) == 7


def test_cohorts_are_distinct_and_checked():
    sample = jax.jit(lambda key: sample_cohort(key, POPULATION, 5))
    cohorts = {tuple(np.asarray(sample(jax.random.key(seed))).tolist()) for seed in range(20)}
    assert all(len(set(ids)) == 5 and set(ids) <= set(range(POPULATION)) for ids in cohorts)
    assert len(cohorts) == 20
    assert set().union(*cohorts) == set(range(POPULATION))
    for size in (0, POPULATION + 1):
        with pytest.raises(ValueError, match=f"cohort of {size} clients: allowed are 1 to"):
            sample_cohort(KEY, POPULATION, size)
