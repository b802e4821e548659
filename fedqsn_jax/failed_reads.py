"""Keeps quiet what comes after the first failure where many tensors are read at once.

Orbax reads the tensors of a checkpoint side by side. At the first one that fails it raises, and
closes its event loop, while TensorStore's threads go on with the others. Those that end later
cannot tell the closed loop, of which Python prints a traceback; and those that have failed too are
told by asyncio, with another, when their tasks are collected. That happens at any time, even after
the error has been answered, and says nothing that the error does not.
"""

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_lock = threading.Lock()


class _UnretrievedFailures(logging.Filter):
    """Drops asyncio's records of failures that name a file in one of the directories."""

    def __init__(self) -> None:
        super().__init__()
        self.directories: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or "exception was never retrieved" not in record.getMessage():
            return True
        return not any(directory in str(error) for directory in self.directories)


class _ClosedLoops:
    """An unraisable hook that leaves out reads that could not tell a closed loop of their end."""

    def __init__(self, hook: Callable[["sys.UnraisableHookArgs"], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        # Without an object: called by no Python code, but by a thread of TensorStore's.
        if not (closed and unraisable.object is None):
            self._hook(unraisable)


_failures = _UnretrievedFailures()


def expect_failures(directory: Path) -> None:
    """Leaves out, from here on, what follows a failure to read from a directory; nothing else."""
    with _lock:
        _failures.directories.add(str(directory))
        logging.getLogger("asyncio").addFilter(_failures)
        if not isinstance(sys.unraisablehook, _ClosedLoops):
            sys.unraisablehook = _ClosedLoops(sys.unraisablehook)
