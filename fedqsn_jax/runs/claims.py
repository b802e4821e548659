"""One run at a time in a directory: a lock on the directory itself, which leaves nothing behind."""

import errno
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.host.signals import cleaning_up

try:
    import fcntl
except ImportError:  # Not everywhere; there, two runs are not kept apart.
    fcntl = None  # type: ignore[assignment]

PRIVATE = 0o700
"""The mode of a working directory: it holds the hidden model."""

_ATTEMPTS = 10
"""How often a directory is made that others remove meanwhile; each of them does so once."""

_LOOK_SECONDS = 0.1
"""Longer than anyone takes to look whether a directory is free."""


def check_free(path: Path) -> None:
    """Makes sure that no run is at work in a directory, if there is one.

    Raises:
      ConfigError: One is, or the file system refuses.
    """
    try:
        if path.is_dir():
            os.close(_lock(path, shared=True))
    except OSError as error:
        raise _unavailable(path, error) from error


@contextmanager
def claim_directory(path: Path) -> Iterator[None]:
    """Makes a directory private and ours while the ``with`` block runs; see `WorkDirectory.claim`.

    Raises:
      ConfigError: Another run is at work in it, or the file system refuses.
    """
    created: set[Path] = set()
    try:
        descriptor = _make_and_lock(path, created)
    except OSError as error:
        if not os.path.exists(path):
            # Nobody has locked it, and those above it are nobody's yet.
            remove_empty(created - {path})
        raise _unavailable(path, error) from error
    try:
        # Only of what is locked: another's directory may be as empty. And before others may lock.
        with cleaning_up(lambda: remove_empty(created)):
            yield
    finally:
        os.close(descriptor)


def _make_and_lock(path: Path, created: set[Path]) -> int:
    """Makes a directory, and locks it as `_lock` does.

    Whoever had it before may remove it between any two of the steps.

    Args:
      path: The directory.
      created: What did not exist, it and those above it, is added here.
    """
    for attempt in range(_ATTEMPTS):
        created |= missing_directories(path)
        try:
            path.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            path.chmod(PRIVATE)
            descriptor = _lock(path)
        except FileNotFoundError:
            if attempt + 1 == _ATTEMPTS:
                raise
            continue
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "others make and remove it all the time")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still names what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def missing_directories(path: Path) -> set[Path]:
    """Returns which of a directory and those above it do not exist."""
    return {each for each in (path, *path.parents) if not each.exists()}


def remove_empty(directories: Iterable[Path]) -> None:
    """Removes directories, innermost first, up to the first that is not there or not empty."""
    with suppress(OSError):
        for directory in sorted(directories, reverse=True):
            directory.rmdir()


def _unavailable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror
    if error.errno == errno.EWOULDBLOCK:
        reason = "another run is at work in it; wait for its end, or name another directory"
    return ConfigError(f"--workdir={path}: {reason}")


def _lock(directory: Path, shared: bool = False) -> int:
    """Locks a directory until the descriptor that it returns is closed; EWOULDBLOCK if it is.

    Those who only look have a shared lock for a moment, which keeps nobody out.

    Args:
      directory: Which.
      shared: Whether others may have such a lock too: enough to see that nobody has one alone.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if fcntl is not None:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOOK_SECONDS)
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        # Others mean that the file system has no such locks.
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise
    return descriptor
