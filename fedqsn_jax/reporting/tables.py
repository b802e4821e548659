"""Tables that fit the width they have: what is too wide is split into several, none is cut."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

_ASCII_RULES = box.Box(
    # Like box.SIMPLE, which has no equivalent in ASCII that leaves out the vertical lines.
    "    \n    \n -- \n    \n    \n -- \n    \n    \n",
    ascii=True,
)
_SHORTEST_NAME, _LONGEST_WORD = 12, 20
_GAP = 2


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      head: What stands above it.
      cells: Its texts, one a row.
      group: What several columns in a row have in common; it stands above the first of them.
      right: Whether texts stand at its right, as numbers do.
      foot: What stands below it.
    """

    head: str
    cells: Sequence[str | Text]
    group: str = ""
    right: bool = True
    foot: str = ""

    @property
    def width(self) -> int:
        """The characters of its widest line, but for the group's name."""
        texts = (self.head, self.foot, *map(str, self.cells))
        return max(cell_len(line) for text in texts for line in text.split("\n"))


def make_tables(
    title: str, names: Column, columns: Sequence[Column], width: int, plain: bool
) -> Iterator[str | Table]:
    """Makes a table of rows with names, or several where one would be too wide.

    First names are folded, to a dozen characters or their longest word. If that is not enough,
    there are several tables: each has the names, and as many of the columns as fit beside them,
    columns of a group together where that is possible. Names take a third of the width there, or
    as much as their longest word.

    Args:
      title: What stands above the names; where it is too long, in a line of its own.
      names: The rows' names; its head is not used.
      columns: The other columns.
      width: The characters of a line.
      plain: Whether only ASCII is to be used.

    Yields:
      The title, if it stands alone, and the tables.
    """
    words = (word for name in names.cells for word in re.split(r"(?<=/)|\s", str(name)))
    shortest = max(_SHORTEST_NAME, min(max(map(cell_len, words), default=0), _LONGEST_WORD))
    shortest = min(shortest, names.width)
    room = width - natural_width(columns) - _GAP
    if room < shortest:
        widest = max((natural_width([each]) for each in columns), default=0)
        room = max(min(width - widest - _GAP, max(width // 3, shortest)), _SHORTEST_NAME)
        room = min(room, names.width)
    if cell_len(title) > room:
        yield title
        title = ""
    longest = min(max(names.width, cell_len(title)), room)
    for piece in _pieces(columns, width - longest - _GAP):
        yield _make_table(title, names, piece, longest, plain)


def _pieces(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """Columns that fit beside each other; a group begins a new line rather than to be divided."""
    if natural_width(columns) <= room:
        return [list(columns)]
    pieces: list[list[Column]] = [[]]
    for index, column in enumerate(columns):
        follows = index > 0 and column.group and columns[index - 1].group == column.group
        group = [each for each in columns[index:] if each.group == column.group]
        whole = (
            column.group
            and not follows
            and natural_width(pieces[-1] + group) > room >= natural_width(group)
        )
        if pieces[-1] and (whole or natural_width([*pieces[-1], column]) > room):
            pieces.append([])
        pieces[-1].append(column)
    return pieces


def natural_width(columns: Sequence[Column]) -> int:
    """Returns the characters that columns take beside each other."""
    heads = _heads(columns)
    return sum(
        max(column.width, *(cell_len(line) for line in head)) + _GAP
        for column, head in zip(columns, heads, strict=True)
    ) - (_GAP if columns else 0)


def _heads(columns: Sequence[Column]) -> list[list[str]]:
    """The lines above each column: the group's name over the first column of it, and its own."""
    grouped = any(column.group for column in columns)
    heads = []
    for index, column in enumerate(columns):
        first = index == 0 or columns[index - 1].group != column.group
        heads.append([column.group if first else "", column.head] if grouped else [column.head])
    return heads


def _make_table(
    title: str, names: Column, columns: Sequence[Column], longest: int, plain: bool
) -> Table:
    table = Table(
        box=_ASCII_RULES if plain else box.SIMPLE,
        show_edge=False,
        show_footer=bool(names.foot),
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    heads = _heads(columns)
    below = "\n" * (max(map(len, heads), default=1) - 1)
    table.add_column(
        Text(below + title) if title else "",
        names.foot,
        overflow="fold",
        justify="right" if names.right else "left",
        min_width=longest,
        max_width=longest,
    )
    for column, head in zip(columns, heads, strict=True):
        table.add_column(
            Text("\n".join(head)),
            Text(column.foot),
            justify="right" if column.right else "left",
            no_wrap=True,
        )
    for index, name in enumerate(names.cells):
        style = name.style if isinstance(name, Text) else ""
        folded = Text(fold_path(str(name), longest), style)
        cells = (column.cells[index] for column in columns)
        table.add_row(folded, *(Text(each) if isinstance(each, str) else each for each in cells))
    return table


def fold_path(path: str, width: int) -> str:
    """Breaks a path into lines of at most ``width`` after its slashes, as far as it has them."""
    lines = [""]
    parts = path.split("/")
    for index, part in enumerate(parts):
        piece = part + "/" * (index < len(parts) - 1)
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
