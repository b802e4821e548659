"""Patterns of the paths of tensors.

A pattern is compared with the whole path, name by name, in the shell's style and without regard to
case: ``conv_*`` stands for one name that begins so. A name that is ``*`` alone stands for any
number of names, none included. So ``*/head/kernel`` is the kernel of every ``head``, at any depth,
and of no ``overhead``.
"""

import fnmatch
from collections.abc import Iterable, Sequence


def matches_any(path: str, patterns: Iterable[str]) -> bool:
    """Returns whether one of the patterns fits a path, names joined by ``/``."""
    names = path.lower().split("/")
    return any(_matches(names, pattern.lower().split("/")) for pattern in patterns)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] in ("*", "**"):
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    return (
        bool(names)
        and fnmatch.fnmatchcase(names[0], pattern[0])
        and _matches(names[1:], pattern[1:])
    )
