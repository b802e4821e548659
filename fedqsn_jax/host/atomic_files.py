"""Files that are replaced as a whole: a reader sees the old content or the new, never a part."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from fedqsn_jax.core.errors import UserError
from fedqsn_jax.host.signals import cleaning_up

_OF_THE_FILE_SYSTEM = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "EISDIR", "ENOTDIR"),
        *("EEXIST", "ENOENT", "ENOTEMPTY", "EMFILE", "ENFILE", "ENAMETOOLONG", "ELOOP", "ESTALE"),
    )
    if hasattr(errno, name)
}


class FileError(UserError):
    """A file that cannot be written or read: a full disk, a missing right, a directory there."""


@contextlib.contextmanager
def told_as_file_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the file system refuses inside the block into a `FileError`, which is one line.

    Other `OSError`, such as those of a network, pass.

    Args:
      path: What the block writes or reads, for the line.

    Raises:
      FileError: The file system refuses.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_FILE_SYSTEM:
            raise
        raise FileError(f"{os.fspath(path)}: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to; what is written there takes the place of ``path`` at the end.

    The content is on the disk before the name changes, so that not even a loss of power leaves a
    file in part. An exception inside the block, or Ctrl-C, leaves ``path`` as it was, and nothing
    beside it.

    Args:
      path: The file to replace or to create; its directory exists.

    Yields:
      A path in the same directory. The block writes the new content there and closes it.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.new")
    with cleaning_up(lambda: temporary.unlink(missing_ok=True)):
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, final)
