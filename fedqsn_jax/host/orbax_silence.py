"""Keeps Orbax to one line: every failure reaches the caller as an exception, and only so.

Without this a save tells its story in a dozen lines, and the answer to a damaged checkpoint or a
full disk, one line, drowns in up to 157 lines of tracebacks, some of them after the command's end.

Orbax reads and writes the tensors of a checkpoint side by side. At the first one that fails it
raises, and closes its event loop, while TensorStore's threads go on with the others. Those that end
later cannot tell the closed loop, of which Python prints a traceback; and those that have failed
too are told by asyncio, with another, when their tasks are collected. That happens at any time,
even after the error has been answered, and says nothing that the error does not.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging as absl_logging

_lock = threading.Lock()
_expected: tuple[str, ...] = ()
"""How the names begin of what is being read, or could not be read; replaced as a whole."""


class _UnretrievedFailures(logging.Filter):
    """Drops asyncio's records of failures that name a file in one of the directories."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or "exception was never retrieved" not in record.getMessage():
            return True
        return not any(directory in str(error) for directory in _expected)


class _ClosedLoops:
    """An unraisable hook that leaves out reads that could not tell a closed loop of their end."""

    def __init__(self, hook: Callable[["sys.UnraisableHookArgs"], Any]) -> None:
        self.hook = hook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        # Without an object: called by no Python code, but by a thread of TensorStore's.
        if not (_expected and closed and unraisable.object is None):
            self.hook(unraisable)


_failures = _UnretrievedFailures()


@contextlib.contextmanager
def failures_told_once(directory: Path) -> Iterator[None]:
    """Leaves out what follows the failure of a read or a save, which the block lets through.

    Two things are left out while the block runs, since the threads do not wait for its end; and
    where it has failed, from then on, since they may end at any time. What asyncio logs of
    exceptions that were never retrieved, if they name a file in the directory. And what Python
    tells of a ``RuntimeError("Event loop is closed")`` that no object of Python's has raised: it
    does not name a directory, so this holds for all of the process. After a read without a failure
    nothing is left out.

    Args:
      directory: What the block reads or writes.
    """
    prefix = f"{directory}{os.sep}"
    _expect(add=prefix)
    # Not in a finally: a failure is still to be followed by the others.
    yield
    _expect(remove=prefix)


def _expect(add: str | None = None, remove: str | None = None) -> None:
    global _expected
    with _lock:
        left = list(_expected)
        if remove is not None:
            left.remove(remove)
        _expected = (*left, *([] if add is None else [add]))
        logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
        if _expected:
            logger.addFilter(_failures)
            if not isinstance(hook, _ClosedLoops):
                sys.unraisablehook = _ClosedLoops(hook)
        else:
            logger.removeFilter(_failures)
            # Under another hook ours stays, and lets everything through.
            if isinstance(hook, _ClosedLoops):
                sys.unraisablehook = hook.hook


class OrbaxSilence(logging.Filter):
    """Drops Orbax's records, unless absl's verbosity is debug.

    Orbax tells every save's story at the level of absl's default verbosity, and every failure
    several times with tracebacks; failures reach the caller as exceptions.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets a record pass or not."""
        from_orbax = "/orbax/checkpoint/" in record.pathname.replace("\\", "/")
        return not from_orbax or absl_logging.level_debug()
