"""Poisson cohorts: who takes part, how many, and what becomes of empty places."""

import dataclasses

import jax
import numpy as np
import pytest
from rounds_cases import (
    FEDQSN,
    KEY,
    POPULATION,
    TRANSFORM,
    fast,
    federate,
    octets,
    simulated_proxies,
)
from scipy import stats

from fedqsn_jax.rounds.calls import draw_cohorts
from fedqsn_jax.rounds.poisson import NOBODY, poisson_places, sample_poisson_cohort

DRAWS = 20_000


def drawn(population, expected):
    keys = jax.random.split(KEY, DRAWS)
    return np.asarray(
        jax.jit(jax.vmap(lambda k: sample_poisson_cohort(k, population, expected)))(keys)
    )


def test_places_are_the_mean_and_some_standard_deviations():
    # sqrt(1000 * .05 * .95) = 6.892
    assert poisson_places(1000, 50) == 81
    assert poisson_places(8, 4) == 8
    assert poisson_places(20, 20) == 20


@pytest.mark.parametrize(("population", "expected"), [(30, 3), (1000, 50)])
def test_numbers_are_binomial_and_what_is_beyond_the_places_is_cut_off(population, expected):
    places = poisson_places(population, expected)
    cohorts = drawn(population, expected)
    counts = (cohorts != NOBODY).sum(axis=1)
    law = stats.binom(population, expected / population)
    chances = np.append(law.pmf(np.arange(places)), law.sf(places - 1))
    observed = np.bincount(counts, minlength=places + 1)
    often = chances * DRAWS > 10
    grouped = np.append(observed[often], observed[~often].sum())
    wanted = np.append(chances[often], chances[~often].sum()) * DRAWS
    assert stats.chisquare(grouped, wanted).pvalue > 1e-3
    # Empty places are the last.
    assert (np.diff((cohorts == NOBODY).astype(int), axis=1) >= 0).all()


def test_clients_take_part_each_on_its_own():
    population, expected = 10, 4
    cohorts = drawn(population, expected)
    takes_part = (cohorts[:, :, None] == np.arange(population)).sum(axis=1)
    assert takes_part.max() == 1, "nobody twice"
    covariance = np.cov(takes_part.T)
    np.testing.assert_allclose(takes_part.mean(axis=0), 0.4, atol=4 * (0.24 / DRAWS) ** 0.5)
    np.testing.assert_allclose(covariance, 0.24 * np.eye(population), atol=4 * 0.24 / DRAWS**0.5)


@pytest.mark.parametrize("expected", [0, 9])
def test_a_mean_number_beyond_the_population_is_refused(expected):
    with pytest.raises(ValueError, match="allowed are 1 to the population, 8"):
        sample_poisson_cohort(KEY, POPULATION, expected)


@pytest.mark.usefixtures("quick_compilation")
def test_empty_places_leave_no_trace(model, data):
    """Against counts by hand: of visible columns, of those who came, of what colluders know."""
    federation = federate(model, FEDQSN, cohort=4, sampling="poisson", attackers=(POPULATION,))
    state = fast(federation.init)(KEY, model.params)
    run = fast(federation.round)
    cohorts = draw_cohorts(federation, state, 6)
    counts = (cohorts != NOBODY).sum(axis=1)
    assert len(set(counts.tolist())) > 2, "cohorts of several sizes"
    known = {site.path: np.zeros((site.layers, site.columns), bool) for site in model.sites}
    rows = np.asarray(data.offsets[1:] - data.offsets[:-1])
    for index, count in enumerate(counts):
        there = cohorts[index, :count]
        proxies, _ = simulated_proxies(TRANSFORM, model, state)
        state, facts = run(state, data)
        assert int(facts["clients/drawn"]) == count
        assert int(facts["clients/returned"]) == (rows[there] > 0).sum()
        for site in model.sites.drawing:
            seen = [proxies[client].visible[site.path] for client in there]
            assert int(facts[f"visible/{site.path}"]) == sum(each.sum() for each in seen)
            known[site.path] = np.logical_or.reduce([known[site.path], *seen])
            np.testing.assert_array_equal(
                state.attackers[f"attacker_{POPULATION}"].known[site.path], known[site.path]
            )


@pytest.mark.usefixtures("quick_compilation")
def test_who_takes_part_is_drawn_from_the_secret_key(model):
    federation = federate(model, FEDQSN, cohort=4, sampling="poisson")
    state = federation.init(KEY, model.params)
    ours = octets(federation.cohort(state))
    other = jax.random.key(99)
    assert octets(federation.cohort(dataclasses.replace(state, public_key=other))) == ours
    assert octets(federation.cohort(dataclasses.replace(state, secret_key=other))) != ours
