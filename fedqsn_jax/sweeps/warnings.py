"""What a sweep warns of: what its points' runs would, each thing once, and of which points."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fedqsn_jax.config.schema import Config
from fedqsn_jax.simulation.running import Entry
from fedqsn_jax.simulation.warnings import (
    DIVERGED,
    has_diverged,
    rejected,
    rejection,
    warnings_before_run,
)

Where = Mapping[str, Any]
"""What tells a point from others: its settings and its seed."""


def warnings_before_sweep(
    combinations: Iterable[tuple[Config, int]], points: Sequence[Where], chosen: Collection[str]
) -> list[str]:
    """Returns what to tell before a sweep, a line each.

    Args:
      combinations: Every configuration that the grids mean, with the place of its point.
      points: The points.
      chosen: Fields that the user set one by one; see `unused_settings.ignored_settings`.
    """
    concerned: dict[str, set[int]] = {}
    for config, place in combinations:
        for line in warnings_before_run(config, chosen):
            concerned.setdefault(line, set()).add(place)
    return [f"{line} ({among(places, points)})" for line, places in concerned.items()]


def warnings_after_sweep(
    ends: Sequence[tuple[Config, Entry]], points: Sequence[Where]
) -> list[str]:
    """Returns what to tell at the end of a sweep, a line each.

    Args:
      ends: Of every point its configuration, and what its last evaluated round told.
      points: The points, in the same order.
    """
    lines = []
    counts = [rejected(config, entry) for config, entry in ends]
    rejecting = {place for place, count in enumerate(counts) if count}
    if rejecting:
        returned = sum(int(ends[place][1]["clients/returned"]) for place in rejecting)
        line = rejection(
            f"{sum(counts)} of {returned} clients' updates", "in the last round evaluated"
        )
        lines.append(f"{line} ({among(rejecting, points)})")
    diverged = {place for place, (_, entry) in enumerate(ends) if has_diverged(entry)}
    if diverged:
        lines.append(f"{DIVERGED} ({among(diverged, points)})")
    return lines


def among(places: Collection[int], points: Sequence[Where]) -> str:
    """Names some points briefly: by the values that they share and others have not, and how many.

    Args:
      places: Their places among the points; not empty.
      points: All points.
    """
    some = [points[place] for place in sorted(places)]
    shared = [
        f"{name}={value}"
        for name, value in some[0].items()
        if value is not None
        and all(point[name] == value for point in some)
        and any(point[name] != value for point in points)
    ]
    count = f"{len(some)} of {len(points)} points"
    return f"{' '.join(shared)}, {count}" if shared else count
