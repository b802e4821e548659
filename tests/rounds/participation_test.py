"""Clients that fail: who returns what, and what is made of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds_cases import (
    FEDQSN,
    KEY,
    POPULATION,
    TRANSFORM,
    double,
    fast,
    federate,
    octets,
    shared_federation,
    simulated_proxies,
)

from fedqsn_jax.config.schema import ConfigError, resolve
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.rounds.aggregation import make_aggregator
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_optimizer import unscheduled
from fedqsn_jax.rounds.participation import Participation, draw_attendance

FAULTS = Participation(dropout=0.3, stragglers=0.5, straggler_share=0.25, nan=0.3)
ROUND_FAULTS = Participation(dropout=0.25, stragglers=0.5, straggler_share=0.5, nan=0.5)


def test_draws_have_their_frequencies_and_belong_to_the_client():
    ids = jnp.arange(20_000, dtype=jnp.int32)
    steps = jnp.where(ids % 4 == 0, 0, jnp.where(ids % 4 == 1, 1, 10)).astype(jnp.int32)
    drawn = jax.device_get(draw_attendance(KEY, ids, steps, FAULTS))
    assert not drawn.returns[::4].any(), "a client without steps has nothing to return"
    working = np.asarray(ids) % 4 > 0
    for share, expected in (
        (1 - drawn.returns[working].mean(), 0.3),
        (drawn.broken.mean(), 0.3),
        # A quarter of ten steps, rounded half to even.
        ((drawn.steps[2::4][drawn.returns[2::4]] == 2).mean(), 0.5),
    ):
        assert abs(share - expected) < 4 * (0.25 / 5_000) ** 0.5
    assert set(drawn.steps[1::4].tolist()) == {0, 1}, "a straggler takes at least one step"
    assert set(drawn.steps[2::4].tolist()) == {0, 2, 10}
    np.testing.assert_array_equal(drawn.steps > 0, drawn.returns)
    order = np.random.default_rng(0).permutation(20_000)
    shuffled = draw_attendance(KEY, ids[order], steps[order], FAULTS)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), shuffled, drawn)


def test_the_mean_is_of_those_that_returned(model, data):
    """Against clients that are trained one by one and averaged column by column in NumPy."""
    settings = ROUND_FAULTS
    federations = [
        federate(model, FEDQSN, cohort=POPULATION, participation=settings, normalize=normalize)
        for normalize in ("mean", "coverage")
    ]
    state = fast(federations[0].init)(KEY, model.params)
    proxies, _ = simulated_proxies(TRANSFORM, model, state)
    (mean, facts), (by_coverage, _) = (fast(each.round)(state, data) for each in federations)

    update = make_client_update(
        model.apply_fn, classification(), unscheduled(optax.sgd(0.2)), 4, epochs=2
    )
    key = jax.random.fold_in(state.public_key, state.round)
    ids = jnp.arange(POPULATION, dtype=jnp.int32)
    steps = update.step_count(data.rows(ids))
    drawn = jax.device_get(draw_attendance(key, ids, steps, settings))

    @fast
    def train(proxy, client_id, steps):
        rows, own_key = data.rows(client_id), jax.random.fold_in(key, client_id)
        return update.finish(
            proxy,
            rows,
            jax.lax.fori_loop(
                0,
                steps,
                lambda index, training: update.step(
                    own_key, data, client_id, index, training, update.shared(proxy)
                ),
                update.start(proxy, rows),
            ),
        )

    total, covered = (jax.tree.map(np.zeros_like, double(model.params)) for _ in range(2))
    counted, losses, weights, seen_by = 0, 0.0, 0.0, {site.path: 0 for site in model.sites}
    for client in np.flatnonzero(drawn.returns):
        for path, seen in proxies[client].visible.items():
            seen_by[path] += seen.sum()
        if drawn.broken[client]:
            continue
        result = jax.device_get(train(proxies[client], ids[client], drawn.steps[client]))
        weight = int(data.rows(int(client)))
        counted, weights, losses = counted + 1, weights + weight, losses + weight * result.loss
        for layer, tensors in total.items():
            seen = proxies[client].visible.get(f"{layer}/kernel", np.ones((1, 1), bool))[0]
            for name in tensors:
                total[layer][name] += weight * result.delta[layer][name]
                covered[layer][name] += weight * seen
    assert 2 <= counted < drawn.returns.sum() < POPULATION - 1, "one dropped out, one is broken"
    assert (drawn.steps < np.asarray(steps))[drawn.returns].any(), "and one is a straggler"
    jax.tree.map(
        lambda a, old, sum_: np.testing.assert_allclose(a, old + sum_ / weights, 1e-5, 1e-6),
        mean.params,
        double(model.params),
        total,
    )
    jax.tree.map(
        lambda a, old, sum_, by: np.testing.assert_allclose(
            a, old + np.where(by > 0, sum_ / np.maximum(by, 1), 0), 1e-5, 1e-6
        ),
        by_coverage.params,
        double(model.params),
        total,
        covered,
    )
    assert facts["clients/returned"] == drawn.returns.sum()
    assert facts["clients/rejected"] == drawn.returns.sum() - counted
    np.testing.assert_allclose(facts["train/loss"], losses / weights, rtol=1e-5)
    for path, count in seen_by.items():
        assert facts[f"returned/{path}"] == count
        assert facts[f"visible/{path}"] == sum(proxy.visible[path].sum() for proxy in proxies)


def test_when_nothing_usable_returns_nothing_changes_but_what_attackers_have(model, data, shared):
    """Whoever drops out has received a proxy all the same."""
    _, init, run, _ = shared
    state, _ = run(init(KEY, model.params), data)
    expected, _ = run(state, data)
    for faults in (Participation(dropout=1.0), Participation(nan=1.0)):
        after, facts = fast(shared_federation(model, faults).round)(state, data)
        assert octets(after.attackers) == octets(expected.attackers) != octets(state.attackers)
        untouched = dataclasses.replace(after, attackers=state.attackers, round=state.round)
        assert octets(untouched) == octets(state) != octets(expected)
        assert np.isnan(facts["train/loss"])  # Nobody trained: there is none.
        assert facts["clients/rejected"] == facts["clients/returned"]


def test_clipping_and_rejection_by_hand(model):
    """A delta of ones has the norm sqrt(n): clipped to 2 each entry is 2 / sqrt(n)."""
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), model.params)
    entries = sum(leaf.size for leaf in jax.tree.leaves(ones))
    seen = {"hidden_0/kernel": np.arange(10)[None] % 2 > 0}
    contribute = jax.jit(make_aggregator(model.sites, optax.sgd(1.0), clip_norm=2.0).contribute)
    part = contribute(ones, np.float32(3), seen)
    for leaf in jax.tree.leaves(part.delta):
        np.testing.assert_allclose(leaf, 3 * 2 / entries**0.5, rtol=1e-6)
    short = contribute(jax.tree.map(lambda x: x * 1e-2, ones), np.float32(3), seen)
    for leaf in jax.tree.leaves(short.delta):
        np.testing.assert_allclose(leaf, 3e-2, rtol=1e-6)
    np.testing.assert_array_equal(part.coverage["hidden_0/kernel"], 3 * seen["hidden_0/kernel"])
    assert (part.weight, part.rejected) == (3, 0)
    for poison in (np.nan, np.inf, 1e30):
        broken = {**ones, "head": {**ones["head"], "bias": np.full(3, poison, np.float32)}}
        part = contribute(broken, np.float32(3), seen)
        assert part.rejected == 1
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(part.replace(rejected=0)))


@pytest.mark.parametrize("field", ["dropout", "stragglers", "straggler_share", "nan"])
def test_probabilities_are_checked(field):
    with pytest.raises(ConfigError, match=rf"^participation.{field} = 1.5: allowed is 0 to 1$"):
        resolve({"participation": {field: 1.5}})
