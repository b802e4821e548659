"""Paths as users write them: the one place where ``~`` becomes a home directory."""

import os
from pathlib import Path

from fedqsn_jax.core.errors import UserError


def user_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path with ``~`` or ``~USER`` at its begin expanded.

    Raises:
      UserError: There is no such user, or no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{os.fspath(path)}: there is no such home directory; allowed is a path that exists, "
            f"or ./{os.fspath(path)} for a directory of that name"
        ) from error
