"""Writes the table of all fields in ``configs/README.md``.

  python -m fedqsn_jax.tools.configuration_table

It stands between two marks in that file, and says of every field what `config.settings` says.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedqsn_jax.config.fields import Description, describe
from fedqsn_jax.config.schema import Config
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.host import signals

README = "configs/README.md"
BEGIN = "<!-- The table is written by: python -m fedqsn_jax.tools.configuration_table -->"
END = "<!-- End of the table. -->"


def table() -> str:
    """Returns the table of all fields, in Markdown."""
    heading = "| field | default | what it is | allowed | used when |\n|---|---|---|---|---|\n"
    return heading + "".join(map(_row, describe(Config).values()))


def _row(field: Description) -> str:
    cells = (
        f"`{field.name}`",
        f"`{field.default!r}`",
        field.help,
        field.allowed_words(),
        field.used.words if field.used else "",
    )
    return f"| {' | '.join(cells)} |\n"


def with_table(text: str) -> str:
    """Returns a text with what stands between the marks replaced by the table.

    Raises:
      UserError: It has no such marks.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the file has no place for the table: allowed are {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n{table()}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table into a file; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m fedqsn_jax.tools.configuration_table",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "file", nargs="?", default=README, type=Path, help="by default configs/README.md"
    )
    file = parser.parse_args(arguments).file
    try:
        file.write_text(with_table(file.read_text()))
    except OSError as error:
        return signals.refuse(UserError(f"{file}: {error.strerror}"))
    except UserError as error:
        return signals.refuse(UserError(f"{file}: {error}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
