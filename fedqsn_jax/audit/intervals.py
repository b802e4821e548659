"""How sure the figures of an audit are: bootstrap over test rows, kept benefit, protected share.

Rows are resampled with replacement, the same rows for every model, so that differences between
models are compared on the same rows (Efron and Tibshirani, An Introduction to the Bootstrap, 1993:
paired bootstrap, percentile intervals).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Sums = Mapping[str, np.ndarray]
"""A model's statistics of each test row, float ``[rows]`` by name; see `core.tasks.Task`."""

RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A figure and where it lies in 95% of the resamples; NaN where it has no meaning."""

    value: float
    low: float
    high: float


def resampled_weights(rows: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each row occurs in each resample, float64 ``[resamples + 1, rows]``.

    The first is the sample itself: every row once.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=resamples)
    return np.concatenate([np.ones((1, rows)), drawn])


def resampled_scores(
    sums: Sums, weights: np.ndarray, summarize: Callable[[Any], Mapping[str, Any]], score: str
) -> np.ndarray:
    """A model's score in each resample, float64 ``[resamples + 1]``.

    Args:
      sums: Its statistics of each row.
      weights: What `resampled_weights` gives.
      summarize: The task's.
      score: The name of the score.
    """
    # One product for each statistic: a sum over rows with their multiplicities.
    totals = {name: (weights @ np.asarray(each, np.float64)) for name, each in sums.items()}
    return np.asarray(summarize(totals)[score], np.float64)


def interval(values: np.ndarray) -> Interval:
    """The figure of the sample (first) with the percentile interval of the resamples."""
    finite = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(finite):
        return Interval(float("nan"), float("nan"), float("nan"))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, (tail, 1 - tail))
    return Interval(float(values[0]), float(low), float(high))


def kept_benefit(owner: np.ndarray, start: np.ndarray, fedavg: np.ndarray) -> np.ndarray:
    """``U = (global - start) / (FedAvg - start)``, 1 at best; NaN where FedAvg gained nothing."""
    return _ratio(owner - start, fedavg - start)


def protected_share(owner: np.ndarray, attack: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """``P = (global - best attack) / (global - alone)``, 1 at best; NaN where nothing is to gain.

    An attack that is worse than what colluders reach alone counts as `alone`: they would not use
    it.
    """
    return _ratio(owner - np.maximum(attack, alone), owner - alone)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    positive = below > 0
    return np.where(positive, above / np.where(positive, below, 1), np.nan)
