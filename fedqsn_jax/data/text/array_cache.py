"""Arrays on disk under the digest of what they were made from."""

import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.splits import Rows
from fedqsn_jax.host.signals import cleaning_up

_MODE = 0o700


def default_directory() -> Path:
    """Returns ``fedqsn_jax`` in the user's cache directory."""
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fedqsn_jax"


def cached(directory: Path, key: str, build: Callable[[], Rows]) -> Rows:
    """Returns the arrays that belong to a key, from disk where they are there and whole.

    A file that is damaged is built anew and replaced. A file appears under its name only once it
    is complete, so that processes may share a directory. The rows may be private: a directory that
    is created here is its user's alone.

    Args:
      directory: Where the files lie; it is created if need be.
      key: A digest of everything that ``build`` depends on.
      build: Makes the arrays.

    Raises:
      ConfigError: The directory cannot be written.
    """
    file = directory / f"{key}.npz"
    stored = _read(file)
    if stored is not None:
        return stored
    arrays = build()
    try:
        directory.mkdir(mode=_MODE, parents=True, exist_ok=True)
        _write(file, arrays)
    except OSError as error:
        raise ConfigError(f"data.cache = {str(directory)!r}: {error.strerror}") from error
    return arrays


def _read(file: Path) -> Rows | None:
    """The arrays of a file; None where it is absent or damaged."""
    try:
        with zipfile.ZipFile(file) as members:
            # Compares CRC-32s before anything is believed.
            if members.testzip() is not None:
                return None
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    # Damage can make the libraries raise almost anything, and the remedy is always the same.
    except Exception:
        return None


def _write(file: Path, arrays: Rows) -> None:
    # Unlike files that are replaced by one run, this one may be written by several at a time, so
    # the temporary name must be unique.
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with cleaning_up(lambda: Path(temporary).unlink(missing_ok=True)):
        with os.fdopen(descriptor, "wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        os.replace(temporary, file)
