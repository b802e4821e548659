"""Paths as users write them: the one place where ``~`` becomes a home directory."""

import errno
import os
from pathlib import Path

from fedqsn_jax.core.errors import UserError

_SHOWN = 60
"""Characters of a path that a refusal shows of one that is too long."""


def user_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path with ``~`` or ``~USER`` at its begin expanded.

    Raises:
      UserError: There is no such user, or no home directory; or no file system takes such a path,
        as one that is too long, holds a NUL or is a link to itself.
    """
    try:
        expanded = Path(path).expanduser()
        expanded.stat()
        return expanded
    except (ValueError, TypeError) as error:
        # Its literal: a terminal should not be sent its NULs.
        given = os.fspath(path) if isinstance(path, os.PathLike) else path
        raise UserError(f"{given!r}: that is no path ({error})") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            name = os.fspath(path)
            shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
            raise UserError(f"{shown}: {error.strerror}") from error
        # Whether it has to exist, and be one's own, is for others to say.
        return expanded
    except RuntimeError as error:
        raise UserError(
            f"{os.fspath(path)}: there is no such home directory; allowed is a path that exists, "
            f"or ./{os.fspath(path)} for a directory of that name"
        ) from error
