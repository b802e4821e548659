"""P, U and their intervals, against hand-computed values and closed forms."""

import numpy as np
import pytest

from fedqsn_jax.audit.attacks import best
from fedqsn_jax.audit.intervals import (
    interval,
    kept_benefit,
    protected_share,
    resampled_scores,
    resampled_weights,
)


def mean(sums):
    return {"accuracy": sums["correct"] / sums["count"]}


def test_kept_benefit_and_protected_share_by_hand():
    owner, start, fedavg = np.array([0.884]), np.array([0.845]), np.array([0.912])
    np.testing.assert_allclose(kept_benefit(owner, start, fedavg), 0.039 / 0.067)
    attack, alone = np.array([0.853]), np.array([0.693])
    np.testing.assert_allclose(protected_share(owner, attack, alone), 0.031 / 0.191)


def test_who_reaches_nothing_by_attacking_uses_his_rows_alone():
    owner, alone = np.array([0.9]), np.array([0.7])
    assert protected_share(owner, np.array([0.2]), alone) == pytest.approx(1)
    assert protected_share(owner, np.array([0.9]), alone) == pytest.approx(0)


@pytest.mark.parametrize("below", [0.8, 0.9])
def test_without_an_advantage_there_is_no_share(below):
    assert np.isnan(protected_share(np.array([0.8]), np.array([0.8]), np.array([below]))).all()
    assert np.isnan(kept_benefit(np.array([0.8]), np.array([below]), np.array([0.8]))).all()
    assert np.isnan(interval(np.full(5, np.nan)).value)


def test_the_interval_of_a_share_of_rows_is_the_normal_one():
    rows, share = 4000, 0.8
    correct = (np.arange(rows) < share * rows).astype(np.float32)
    weights = resampled_weights(rows, seed=0, resamples=4000)
    scores = resampled_scores(
        {"correct": correct, "count": np.ones(rows)}, weights, mean, "accuracy"
    )
    found = interval(scores)
    half = 1.96 * np.sqrt(share * (1 - share) / rows)
    assert found.value == pytest.approx(share)
    # The quantiles of 4000 resamples are themselves known to about 3% of the half width.
    assert found.low == pytest.approx(share - half, abs=0.1 * half)
    assert found.high == pytest.approx(share + half, abs=0.1 * half)


def test_rows_are_resampled_together_for_all_models():
    generator = np.random.default_rng(0)
    correct = generator.integers(0, 2, 200).astype(np.float32)
    weights = resampled_weights(200, seed=1, resamples=50)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 200).all()
    one, other = (
        resampled_scores({"correct": c, "count": np.ones(200)}, weights, mean, "accuracy")
        for c in (correct, 1 - correct)
    )
    np.testing.assert_allclose(one + other, 1)


def test_the_best_is_chosen_by_score_then_by_loss():
    # BLEU and the like are no shares.
    assert best([(5.0, 1.0), None, (7.0, 2.0), (7.0, 1.5)], rows=10) == 3
    assert best([None, None], rows=10) is None


def test_a_plainer_attack_within_a_standard_error_is_chosen():
    # At .8 of 100 rows the standard error is .04.
    assert best([(0.75, 0.0), None, (0.77, 9.0), (0.8, 0.0)], rows=100) == 2
    assert best([(0.75, 0.0), None, (0.77, 9.0), (0.8, 0.0)], rows=10_000) == 3
    # 17 of 17: (19 / 21 * 2 / 21 / 21) ** .5 = .064, and 16 of 17 is .059 below.
    assert best([(0.9, 0.0), (16 / 17, 2.0), (1.0, 1.0)], rows=17) == 1
