"""How long devices were busy, from a trace of JAX's profiler."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

_GPU = "/device:GPU:"
_STREAM = "Stream"


class Interval(NamedTuple):
    """From ``start`` to ``end``, in one unit of time."""

    start: float
    end: float


def covered(intervals: Iterable[Interval]) -> float:
    """Returns how long at least one of the intervals lasts."""
    total, end = 0.0, float("-inf")
    for interval in sorted(intervals):
        if interval.end > end:
            total += interval.end - max(interval.start, end)
            end = interval.end
    return total


def busy_seconds(planes: Iterable[Any]) -> list[float]:
    """Returns for each GPU of a trace how long a kernel or a copy ran on one of its streams.

    Args:
      planes: Those of ``jax.profiler.ProfileData``. Other lines than streams, which the profiler
        derives from them, do not count.

    Returns:
      One number a GPU; none where the trace has no GPU.
    """
    return [
        covered(
            Interval(event.start_ns, event.start_ns + event.duration_ns)
            for line in plane.lines
            if line.name.startswith(_STREAM)
            for event in line.events
        )
        / 1e9
        for plane in planes
        if plane.name.startswith(_GPU)
    ]


@contextlib.contextmanager
def traced(directory: Path) -> Iterator[list[float]]:
    """Writes a profiler trace of what is done within.

    Args:
      directory: Where; TensorBoard and Perfetto show what is written.

    Yields:
      A list that holds afterwards what `busy_seconds` says of the trace.
    """
    busy: list[float] = []
    with jax.profiler.trace(str(directory)):
        yield busy
    # Of earlier traces in the directory the name tells seconds only, the file's time more.
    newest = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    busy += busy_seconds(jax.profiler.ProfileData.from_file(str(newest)).planes)
