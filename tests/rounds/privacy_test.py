"""Clipped updates and noise on their sum, against closed forms; and a canary that is looked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds_cases import FEDQSN, KEY, POPULATION, double, fast, federate
from scipy import stats

from fedqsn_jax.data.population import from_clients
from fedqsn_jax.protocol.algorithms import fedavg
from fedqsn_jax.protocol.broadcast import Broadcast
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.upload import quantized_upload
from fedqsn_jax.rounds.aggregation import make_aggregator
from fedqsn_jax.rounds.participation import Participation
from fedqsn_jax.rounds.privacy import Privacy, noise_key, privatize
from fedqsn_jax.simulation.accounting import Account

CLIP = 0.5
NOBODY_RETURNS = Participation(dropout=1.0)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(double(tree))))


def private(noise=1.0, expected=4.0, hidden=0.4):
    return Privacy(clip=CLIP, noise=noise, expected=expected, hidden=hidden)


def rounds(model, data, count=1, algorithm=FEDQSN, **settings):
    """The state before some rounds and the one after them; weights are uniform."""
    privacy = settings.get("privacy")
    clip = {"clip_norm": privacy.clip} if privacy else {}
    federation = federate(model, algorithm, weighting="uniform", **clip, **settings)
    before = state = fast(federation.init)(KEY, model.params)
    run = fast(federation.round)
    for _ in range(count):
        state, facts = run(state, data)
    return before, state, facts


def test_a_quantized_update_is_clipped_over_all_tensors_together(model):
    """Quantization can make an update longer; its clipped length is what the sum changes by."""
    aggregator = make_aggregator(model.sites, optax.sgd(1.0), weighting="uniform", clip_norm=CLIP)
    upload = quantized_upload(NormalFloat(2, 4), model.sites)
    longer = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        size = 10.0 ** rng.uniform(-3, 3)
        delta = jax.tree.map(
            lambda leaf, rng=rng, size=size: jnp.asarray(
                size * rng.normal(size=leaf.shape), jnp.float32
            ),
            model.params,
        )
        sent, _ = upload.send(delta, {}, {})
        part = aggregator.contribute(sent, jnp.float32(1), {})
        longer += norm(sent) > norm(delta)
        assert norm(part.delta) <= CLIP * (1 + 1e-6)
        shortened = min(1, CLIP / norm(sent))
        for ours, theirs in zip(
            jax.tree.leaves(part.delta), jax.tree.leaves(double(sent)), strict=True
        ):
            np.testing.assert_allclose(ours, shortened * theirs, rtol=1e-5, atol=1e-9)
    assert longer > 0, "otherwise nothing was tried"


def test_noise_is_normal_of_the_given_size_and_drawn_for_each_tensor_and_round(model):
    shapes = {"hidden_0": {"kernel": (6, 10), "bias": (10,)}, "other": {"kernel": (400, 300)}}
    zeros = jax.tree.map(
        lambda shape: jnp.zeros(shape), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    aggregator = make_aggregator(model.sites, optax.sgd(1.0))
    nothing = aggregator.contribute(zeros, jnp.float32(0), {})
    server = {"hidden_0/kernel": jnp.asarray([[True] * 7 + [False] * 3])}
    draws = [
        jax.device_get(privatize(private(3.0), noise_key(KEY, index), nothing, server, model.sites))
        for index in (0, 1)
    ]
    large = [draw.delta["other"]["kernel"].ravel() for draw in draws]
    for values in large:
        assert stats.kstest(values / (3.0 * CLIP), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(*large)[0, 1]) < 4 / len(large[0]) ** 0.5
    for draw in draws:
        site = draw.delta["hidden_0"]
        assert (site["kernel"][:, :7] != 0).all()
        assert (site["bias"][:7] != 0).all()
        assert not site["kernel"][:, 7:].any(), "hidden columns get none"
        assert not site["bias"][7:].any()
    again = privatize(private(3.0), noise_key(KEY, 0), nothing, server, model.sites)
    np.testing.assert_array_equal(again.delta["other"]["kernel"], draws[0].delta["other"]["kernel"])


@pytest.mark.usefixtures("quick_compilation")
def test_noise_is_there_where_nobody_came_and_its_divisors_are_fixed(model, data):
    """The noise of a round without an answer, by normalization and by the number of rounds."""
    silent = {"participation": NOBODY_RETURNS, "privacy": private(2.0)}
    changes = {}
    for name, count, settings in (
        ("mean", 1, {}),
        ("coverage", 1, {"normalize": "coverage"}),
        ("two rounds", 2, {}),
        ("one-way", 2, {"broadcast": Broadcast(every=0)}),
    ):
        before, after, facts = rounds(model, data, count, **silent, **settings)
        assert int(facts["clients/returned"]) == 0
        changes[name] = jax.tree.map(
            lambda new, old: np.asarray(new, np.float64) - np.asarray(old, np.float64),
            after.params,
            before.params,
        )
    visible = jax.device_get(fast(federate(model, FEDQSN).prepare)(before)).visible
    seen_noise = []
    for layer, tensors in changes["mean"].items():
        for leaf, change in tensors.items():
            moved = change != 0
            seen = visible[f"{layer}/kernel"][0] if layer != "head" else True
            np.testing.assert_array_equal(moved, np.broadcast_to(seen, moved.shape))
            seen_noise.append(change[moved])
            share = 1.0 if layer == "head" else 0.6
            coverage = changes["coverage"][layer][leaf]
            np.testing.assert_allclose(coverage * share, change, rtol=1e-3, atol=1e-6)
            one_way = changes["one-way"][layer][leaf]
            np.testing.assert_allclose(
                2 * one_way, changes["two rounds"][layer][leaf], rtol=1e-3, atol=1e-6
            )
    values = np.concatenate(seen_noise)
    expected = 2.0 * CLIP / 4
    assert abs(values.std() / expected - 1) < 4 / (2 * len(values)) ** 0.5


@pytest.mark.usefixtures("quick_compilation")
def test_sums_are_divided_by_the_expected_number_whoever_returned(model, data):
    """Without noise, and a clip that shortens nothing: a mean over those who came, put right."""
    settings = {"participation": Participation(dropout=0.25, nan=0.5), "cohort": POPULATION}
    loose = dataclasses.replace(private(0.0, expected=5.0), clip=1e6)
    before, plain, facts = rounds(model, data, **settings)
    _, ours, own_facts = rounds(model, data, privacy=loose, **settings)
    counted = int(facts["clients/returned"]) - int(facts["clients/rejected"])
    assert 0 < int(facts["clients/rejected"]) == int(own_facts["clients/rejected"])
    assert 0 < counted < POPULATION - 1
    for start, mean, fixed in zip(
        *(jax.tree.leaves(double(each.params)) for each in (before, plain, ours)), strict=True
    ):
        np.testing.assert_allclose(
            fixed - start, (mean - start) * counted / 5, rtol=1e-3, atol=1e-6
        )


DRAWS = 10_000
DELTA = 0.01


def epsilon_from_below(with_canary, without):
    """What two samples of an attack's statistic show of epsilon, with a confidence of 99.9%.

    The threshold is chosen on one half of each, and the rates are bounded on the other (Clopper and
    Pearson).
    """
    half = DRAWS // 2

    def bound(threshold, ours, others):
        hits, alarms = (int((values > threshold).sum()) for values in (ours, others))
        least = stats.beta.ppf(5e-4, hits, half - hits + 1) if hits else 0.0
        most = stats.beta.ppf(1 - 5e-4, alarms + 1, half - alarms)
        return np.log(max(least - DELTA, 1e-12) / most)

    candidates = np.quantile(with_canary[:half], np.linspace(0.02, 0.98, 97))
    best = max(candidates, key=lambda at: bound(at, with_canary[:half], without[:half]))
    return bound(best, with_canary[half:], without[half:])


@pytest.mark.usefixtures("quick_compilation")
def test_a_canary_shows_no_more_than_is_claimed_and_more_where_noise_is_missing(model):
    """Whole rounds with one client, whose update is as long as may be, or without any.

    That is the worst case: the sum of the others is known. It takes part with probability 1/2.
    """
    rng = np.random.default_rng(0)
    canary = {
        "x": 5 * rng.normal(size=(4, 6)).astype(np.float32),
        "label": np.zeros(4, np.int32),
    }
    nobody = {name: array[:0] for name, array in canary.items()}
    start = from_clients([canary, *[nobody] * (POPULATION - 1)])
    # The same shapes: its rows are there, and nobody's.
    no_rows = dataclasses.replace(start, offsets=jnp.zeros_like(start.offsets))
    population = {"with": start, "without": no_rows}
    keys = jax.random.split(jax.random.key(11), DRAWS)

    def moved(privacy, key, data, sampling="poisson"):
        federation = federate(
            model,
            fedavg(),
            client=optax.sgd(5.0),
            cohort=4 if sampling == "poisson" else POPULATION,
            weighting="uniform",
            clip_norm=privacy.clip,
            privacy=privacy,
            sampling=sampling,
            attackers=(),
        )
        state = federation.init(KEY, model.params)
        # The same public key in all draws: the canary's update is one and the same.
        after, _ = federation.round(dataclasses.replace(state, secret_key=key), data)
        return jax.tree.map(jnp.subtract, after.params, state.params)

    update = fast(lambda key, data: moved(private(0.0), key, data, "without_replacement"))(
        keys[0], population["with"]
    )
    assert norm(update) * 4 == pytest.approx(CLIP, rel=1e-4), "it is clipped"

    def statistics(noise):
        @fast
        @jax.vmap
        def of_one(key_with, key_without):
            results = []
            for key, data in ((key_with, "with"), (key_without, "without")):
                change = moved(private(noise), key, population[data])
                products = jax.tree.map(lambda a, b: (a * b).sum(), change, update)
                results.append(sum(jax.tree.leaves(products)))
            return results

        other = jax.random.split(jax.random.key(12), DRAWS)
        return [np.asarray(values) for values in of_one(keys, other)]

    claimed = Account(1.0, DELTA, POPULATION, 4, POPULATION, True).epsilon(1)
    # It is no empty attack either.
    assert 0.25 * claimed < epsilon_from_below(*statistics(1.0)) < claimed
    assert epsilon_from_below(*statistics(0.5)) > claimed
