"""Files that are replaced as a whole: a reader sees the old content or the new, never a part."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedqsn_jax.host.signals import cleaning_up


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
