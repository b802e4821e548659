"""Files that record a run: metrics as JSON lines, results as JSON, scalars for TensorBoard.

JSON knows no NaN and no infinity, and readers differ about what Python writes for them. Here both
become ``null``, as does a value that does not exist; every other float is written in full
precision and reads back as the same number.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.reporting.summary import Metrics, number

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_FLUSH_SECONDS = 2


def to_plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: scalars of NumPy and JAX as Python's, NaN as None."""
    if isinstance(value, Mapping):
        return {str(name): to_plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        return to_plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON with sorted keys, in the place of what was there."""
    text = json.dumps(to_plain(value), indent=2, sort_keys=True, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


class MetricsFile:
    """A history of metrics on disk: one JSON object a line, one line an evaluated round.

    Example::

      file = MetricsFile(directory / "metrics.jsonl")
      file.rewrite(history)  # what a checkpoint remembers; rounds after it are forgotten
      file.append([{"round": 5, "global/accuracy": 0.97}])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def rewrite(self, history: Iterable[Metrics]) -> None:
        """Replaces the file by this history, in one step; so a run starts, anew or again."""
        with replacing(self._path) as temporary:
            temporary.write_text(_lines(history))

    def append(self, entries: Iterable[Metrics]) -> None:
        """Appends entries; they are with the operating system when this returns."""
        # Opened each time: nothing has to be closed, and an interrupt finds no half-written buffer.
        with self._path.open("a") as file:
            file.write(_lines(entries))


def _lines(entries: Iterable[Metrics]) -> str:
    return "".join(json.dumps(to_plain(entry), allow_nan=False) + "\n" for entry in entries)


class TensorBoard:
    """Scalars for TensorBoard under the names of the metrics, the round as step.

    Use it as a context manager, or call `close`.

    Example::

      with TensorBoard(directory / "tensorboard") as board:
          board.rewrite(history)
          board.append([{"round": 5, "global/accuracy": 0.97}])
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._writer: SummaryWriter | None = None

    def rewrite(self, history: Iterable[Metrics]) -> None:
        """Replaces the directory's event files by this history.

        A run that resumes has events after its checkpoint; appending would show those rounds
        twice.
        """
        self.close()
        for file in self._directory.glob("events.out.tfevents.*"):
            file.unlink()
        self.append(history)

    def append(self, entries: Iterable[Metrics]) -> None:
        """Adds entries; TensorBoard sees them within seconds, and at the latest on `close`."""
        if self._writer is None:
            from tensorboardX import SummaryWriter  # not needed to start, or to show the help

            # Names count whole seconds: without more, a file opened soon after would replace this.
            self._writer = SummaryWriter(
                str(self._directory),
                flush_secs=_FLUSH_SECONDS,
                filename_suffix=f".{time.time_ns()}",
            )
        now = time.time()
        entries = list(entries)
        end = float(entries[-1].get("seconds", 0)) if entries else 0.0
        for entry in entries:
            # A history that is written at once keeps its distances on TensorBoard's time axis.
            wall_time = now - (end - float(entry.get("seconds", end)))
            for name, value in entry.items():
                # What is absent or no number is a gap.
                if name != "round" and number(value) is not None:
                    self._writer.add_scalar(name, float(value), int(entry["round"]), wall_time)

    def close(self) -> None:
        """Writes what is pending and closes the file; a later `append` opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
