"""Attack: whether a row of another client was trained on, from what was received.

What clients give away, not what the server does. The loss threshold (Yeom et al., Privacy Risk in
Machine Learning, CSF 2018): rows with a small loss are taken for members. LiRA (Carlini et al.,
Membership Inference Attacks From First Principles, IEEE S&P 2022), offline: shadow models that were
trained without the row say how confident a model is that has not seen it; the further above that
the attacked model is, the likelier it has. Few shadow models, which share one variance.
"""

from typing import NamedTuple

import numpy as np


class Membership(NamedTuple):
    """How well members are told from others.

    Attributes:
      auc: Probability that a member ranks above another row; 0.5 is chance.
      found: Share of members that are found where 1% of the others are accused wrongly.
    """

    auc: float
    found: float


def ranked(members: np.ndarray, others: np.ndarray, false_alarms: float = 0.01) -> Membership:
    """Measures a statistic that is larger for members.

    Args:
      members: Its values for rows that were trained on.
      others: Its values for rows that were not.
      false_alarms: The share of others that may be accused, rounded down to whole rows.
    """
    order = np.sort(others)
    below = np.searchsorted(order, members, side="left")
    equal = np.searchsorted(order, members, side="right") - below
    auc = float((below + equal / 2).mean() / len(others))
    allowed = int(false_alarms * len(others))
    border = order[len(order) - 1 - allowed]
    return Membership(auc, float((members > border).mean()))


def confidence(losses: np.ndarray) -> np.ndarray:
    """``log(p / (1 - p))`` of the right answer's probability, from its loss ``-log(p)``."""
    clipped = np.clip(np.asarray(losses, np.float64), 1e-7, 50)
    return -clipped - np.log(-np.expm1(-clipped))


def likelihood_ratio(attacked: np.ndarray, shadows: np.ndarray) -> np.ndarray:
    """Offline LiRA with one variance for all rows.

    Args:
      attacked: The attacked model's confidence in each row, ``[rows]``.
      shadows: That of models that were not trained on it, ``[models, rows]``, two or more.

    Returns:
      How many standard deviations the attacked model is above the shadows' mean.
    """
    mean = shadows.mean(axis=0)
    spread = np.sqrt(((shadows - mean) ** 2).sum() / ((len(shadows) - 1) * shadows.shape[1]))
    return (attacked - mean) / max(float(spread), 1e-12)
