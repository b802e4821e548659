"""Files that record a run: metrics as JSON lines, results as JSON, scalars for TensorBoard.

JSON knows no NaN and no infinity, and readers differ about what Python writes for them. Here both
become ``null``, as does a value that does not exist; every other float is written in full
precision and reads back as the same number.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedqsn_jax.host.atomic_files import replacing, told_as_file_error
from fedqsn_jax.reporting.summary import Metrics, number

if TYPE_CHECKING:
    from tensorboardX.record_writer import RecordWriter


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
    """Writes a value as indented JSON with sorted keys, in the place of what was there.

    Raises:
      FileError: The file system refuses.
    """
    text = json.dumps(to_plain(value), indent=2, sort_keys=True, allow_nan=False)
    with told_as_file_error(path), replacing(path) as temporary:
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
        """Replaces the file by this history, in one step; so a run starts, anew or again.

        Raises:
          FileError: The file system refuses.
        """
        with told_as_file_error(self._path), replacing(self._path) as temporary:
            temporary.write_text(_lines(history))

    def holds(self, history: Iterable[Metrics]) -> bool:
        """Whether the file can be read, and holds this history and nothing else."""
        try:
            return self._path.read_bytes() == _lines(history).encode()
        except OSError:
            return False

    def append(self, entries: Iterable[Metrics]) -> None:
        """Appends entries; they are with the operating system when this returns.

        Raises:
          FileError: The file system refuses.
        """
        # Opened each time: nothing has to be closed, and an interrupt finds no half-written buffer.
        with told_as_file_error(self._path), self._path.open("a") as file:
            file.write(_lines(entries))


def _lines(entries: Iterable[Metrics]) -> str:
    return "".join(json.dumps(to_plain(entry), allow_nan=False) + "\n" for entry in entries)


class TensorBoard:
    """Scalars for TensorBoard under the names of the metrics, the round as step.

    It only displays, so it never costs a run anything: events are written at once, in the thread
    of the caller (a writer with a thread and a queue of its own, as tensorboardX has one, would
    block the caller for ever once that thread has died of a full disk). What the file system
    refuses is told once, and nothing more is written.

    Use it as a context manager, or call `close`.

    Example::

      with TensorBoard(directory / "tensorboard", print) as board:
          board.rewrite(history)
          board.append([{"round": 5, "global/accuracy": 0.97}])
    """

    def __init__(self, directory: str | os.PathLike[str], warn: Callable[[str], object]) -> None:
        """Names the directory, and touches nothing.

        Args:
          directory: Where the event files lie.
          warn: Is told in a line that no more is written.
        """
        self._directory = Path(directory)
        self._warn = warn
        self._writer: RecordWriter | None = None
        self._off = False

    def rewrite(self, history: Iterable[Metrics]) -> None:
        """Replaces the directory's event files by this history.

        A run that resumes has events after its checkpoint; appending would show those rounds
        twice.
        """
        self.close()
        with self._switching_off():
            for file in self._directory.glob("events.out.tfevents.*"):
                file.unlink()
        self.append(history)

    def append(self, entries: Iterable[Metrics]) -> None:
        """Adds entries; they are with the operating system when this returns."""
        entries = list(entries)
        if self._off:
            return
        with self._switching_off():
            if self._writer is None:
                self._writer = self._open()
            now = time.time()
            end = float(entries[-1].get("seconds", 0)) if entries else 0.0
            for entry in entries:
                # A history that is written at once keeps its distances on TensorBoard's time axis.
                wall_time = now - (end - float(entry.get("seconds", end)))
                self._writer.write(_event(entry, wall_time))
            # Not its own flush, which waits for the disk each time.
            self._writer._writer.flush()

    def close(self) -> None:
        """Closes the file; a later `append` opens another."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._switching_off():
                writer.close()

    @contextlib.contextmanager
    def _switching_off(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._off:
                return
            self._off = True
            self._warn(
                f"{self._directory}: {error.strerror or error}; the run goes on without TensorBoard"
            )
            self.close()

    def _open(self) -> "RecordWriter":
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter  # not needed to show the help

        self._directory.mkdir(parents=True, exist_ok=True)
        # Names that count whole seconds would be the same for files opened soon after each other.
        name = f"events.out.tfevents.{int(time.time()):010d}.{time.time_ns()}"
        writer = RecordWriter(str(self._directory / name))
        header = Event(wall_time=time.time(), file_version="brain.Event:2")
        writer.write(header.SerializeToString())
        return writer

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _event(entry: Metrics, wall_time: float) -> bytes:
    """An entry as TensorBoard's record: all its scalars, under one step."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=name, simple_value=float(value))
        for name, value in entry.items()
        if name != "round" and number(value) is not None
    ]
    event = Event(wall_time=wall_time, step=int(entry["round"]), summary=Summary(value=values))
    return bytes(event.SerializeToString())
