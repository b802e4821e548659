"""Whether a run may write where it is to, and whether its checkpoints will find room there."""

import os
import shutil
from pathlib import Path
from typing import Any

from fedqsn_jax.config.schema import CheckpointConfig, ConfigError

_OTHER_BYTES = 1_000_000
"""For metrics, pictures and event files, and what the file system adds."""

_FILES = 60
"""Files and directories of a checkpoint, and of all the rest."""


def check_room(
    directory: Path, state: Any, settings: CheckpointConfig, existing: int
) -> str | None:
    """Compares the room that is left with what the checkpoints need, before anything is written.

    Args:
      directory: Where the run writes, or a directory that is to be made.
      state: The server's state, arrays or their shapes; a checkpoint may be smaller, as it is
        compressed.
      settings: How many checkpoints are kept.
      existing: How many there are already.

    Returns:
      A warning, where the room is enough for a start, but perhaps not for all that are kept.

    Raises:
      ConfigError: There is no room even for one checkpoint while the next one is written.
    """
    import jax  # Only here: mistakes in a command are answered without waiting for JAX.

    nearest = directory.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    one = sum(_bytes(leaf) for leaf in jax.tree.leaves(state))
    # The next one is written before the oldest is removed.
    kept = settings.keep_latest + settings.keep_best + 1
    free = shutil.disk_usage(nearest).free
    least, all_kept = (one * max(n - existing, 1) + _OTHER_BYTES for n in (2, kept))
    system = os.statvfs(nearest)
    if system.f_files and system.f_favail < _FILES:
        raise ConfigError(
            f"--workdir={directory}: the file system has room for {system.f_favail} more files; "
            f"a run needs about {_FILES * kept}"
        )
    what = (
        f"--workdir={directory}: {free / 1e6:.1f} MB are free; a checkpoint takes up to "
        f"{one / 1e6:.1f} MB"
    )
    if free < least:
        raise ConfigError(f"{what}, and two have to fit")
    if free < all_kept:
        return (
            f"{what}, and there may be {kept} (checkpoint.keep_latest = {settings.keep_latest}, "
            f"checkpoint.keep_best = {settings.keep_best}, and the one that is being written)"
        )
    return None


def check_writable(path: Path) -> None:
    """Makes sure that a directory can be made or written, without doing so.

    Raises:
      ConfigError: It cannot.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--workdir={path}: it exists and is not a directory")
    nearest = path
    while not nearest.exists():
        if nearest.is_symlink():
            raise ConfigError(
                f"--workdir={path}: {nearest} is a link to {nearest.readlink()}, which does not "
                f"exist"
            )
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir={path}: {nearest} cannot be written")


def _bytes(leaf: Any) -> int:
    import jax
    import jax.numpy as jnp

    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return int(leaf.size) * leaf.dtype.itemsize
