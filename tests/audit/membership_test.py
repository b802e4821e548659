"""Membership: rankings against closed forms, and a model whose members are known."""

from statistics import NormalDist

import numpy as np
import pytest

from fedqsn_jax.audit.membership import confidence, likelihood_ratio, ranked


def test_a_ranking_by_hand():
    found = ranked(np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0, 1.0]), false_alarms=0.25)
    # 3 is above all four; 1 is above one and equal to two.
    assert found.auc == pytest.approx((4 + 1 + 1) / 8)
    # One of four may be accused: the border is the second largest, 1.
    assert found.found == 0.5


def test_normal_statistics_have_the_area_of_the_closed_form():
    generator = np.random.default_rng(0)
    members, others = generator.normal(1, 1, 20_000), generator.normal(0, 1, 20_000)
    found = ranked(members, others)
    assert found.auc == pytest.approx(NormalDist().cdf(1 / np.sqrt(2)), abs=0.01)
    assert found.found == pytest.approx(1 - NormalDist(1).cdf(NormalDist().inv_cdf(0.99)), abs=0.02)


def test_confidence_is_the_log_odds_of_the_right_answer():
    chance = np.array([0.01, 0.5, 0.9])
    np.testing.assert_allclose(confidence(-np.log(chance)), np.log(chance / (1 - chance)))


def test_shadow_models_take_away_what_makes_rows_easy():
    # Rows differ in difficulty much more than membership changes: the loss alone sees nothing.
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 10, 2000)
    member = np.arange(2000) < 1000
    noise = generator.normal(0, 0.5, (5, 2000))
    attacked = difficulty + 2.0 * member + noise[0]
    shadows = difficulty + noise[1:]
    by_loss = ranked(attacked[member], attacked[~member])
    ratio = likelihood_ratio(attacked, shadows)
    by_ratio = ranked(ratio[member], ratio[~member])
    assert by_loss.auc < 0.62
    # Noise of the attacked model and of the mean of four: variance .25 * (1 + 1 / 4).
    expected = NormalDist().cdf(2.0 / np.sqrt(2 * 0.25 * 1.25))
    assert by_ratio.auc == pytest.approx(expected, abs=0.01)
