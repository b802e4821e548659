"""Means over seeds with their intervals, and which settings nothing else surpasses."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scipy.special import stdtrit

from fedqsn_jax.reporting.summary import views_of


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
      mean: The mean; NaN if a seed has no finite value.
      half: Half the width of its 95% confidence interval (Student's t); NaN with a single seed.
    """

    mean: float
    half: float


class Setting(NamedTuple):
    """What was measured of one setting.

    Attributes:
      settings: The values of the fields that differ between settings; None where the method does
        not use the field.
      seeds: Number of seeds.
      metrics: By name, as in a run's metrics.
    """

    settings: dict[str, Any]
    seeds: int
    metrics: dict[str, Estimate]

    @property
    def method(self) -> str:
        """What is done, in words: the values of the fields that are words, if there are any."""
        words = [value for value in self.settings.values() if isinstance(value, str)]
        return ", ".join(words) or "a setting"


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Returns what dotted fields are called for short: by their last names, where those differ."""
    fields = list(fields)
    last = [field.rpartition(".")[2] for field in fields]
    return {
        field: name if last.count(name) == 1 else field
        for field, name in zip(fields, last, strict=True)
    }


def estimate(values: Sequence[float | None]) -> Estimate:
    """Returns a mean with its interval; None stands for a value that is no number."""
    numbers = [
        float(value) if value is not None and math.isfinite(value) else math.nan for value in values
    ]
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) < 2 or math.isnan(mean):
        return Estimate(mean, math.nan)
    quantile = float(stdtrit(len(numbers) - 1, 0.975))
    return Estimate(mean, quantile * statistics.stdev(numbers) / math.sqrt(len(numbers)))


def ratio(parts: Sequence[float | None], wholes: Sequence[float | None]) -> Estimate:
    """Returns the ratio of two means over the same seeds, with its interval.

    The interval is that of the ratio estimator of sampling theory (Cochran, Sampling Techniques,
    1977, chapter 6): of the mean of ``part - ratio * whole``, divided by the mean of the wholes. A
    mean of each seed's ratio would be ruled by the seed whose whole is next to nothing.
    """
    part, whole = estimate(parts).mean, estimate(wholes).mean
    if math.isnan(part) or math.isnan(whole) or whole == 0:
        return Estimate(math.nan, math.nan)
    share = part / whole
    rests = [a - share * b for a, b in zip(parts, wholes, strict=True)]  # type: ignore[operator]
    return Estimate(share, estimate(rests).half / abs(whole))


def score_of(settings: Sequence[Setting]) -> str:
    """Returns the metric that tells good from bad: the one of which the start was recorded."""
    names = (name for setting in settings for name in setting.metrics)
    return next(name for name in names if name.startswith("start/")).removeprefix("start/")


def rival_view(settings: Sequence[Setting], rival: str) -> str:
    """Returns the view that a kind of rival has: of attackers the most colluders.

    Args:
      settings: The settings.
      rival: ``attacker`` or ``proxy``.
    """
    names = {name for setting in settings for name in setting.metrics}
    views = [view for view in views_of(names, score_of(settings)) if view.startswith(rival)]
    return views[-1] if views else rival


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns which ``(rival, own)`` pairs no other surpasses, by ascending rival.

    A pair surpasses another if its rival is no better, its own no worse, and one of both differs.
    Pairs with NaN are never among them.
    """
    numbers = [index for index, pair in enumerate(points) if not any(map(math.isnan, pair))]
    best, front = -math.inf, []
    for index in sorted(numbers, key=lambda index: (points[index][0], -points[index][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front
