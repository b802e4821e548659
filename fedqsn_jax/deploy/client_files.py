"""A client's own settings: a TOML file that names its rows, written and read."""

import json
import tomllib
from pathlib import Path
from typing import Any

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.deploy.client import check_rows
from fedqsn_jax.deploy.plan import Plan
from fedqsn_jax.deploy.rows import absolute, read_rows
from fedqsn_jax.host.atomic_files import replacing, told_as_file_error

SETTINGS = "fedqsn-client"
"""The name, in the node's configuration, of the client's own settings file."""


def write_client(rows: str, out: Path, plan: Path | None = None) -> None:
    """Writes a client's settings, after its rows were read and found right.

    Args:
      rows: Where its rows are, as `rows.read_rows` takes it.
      out: The file to write.
      plan: The server's ``plan.json``, to which the rows are to fit; None: they are only read.

    Raises:
      UserError: The rows cannot be read or do not fit, or the plan is of another version.
    """
    found = read_rows(rows, "--rows")
    if plan is not None:
        try:
            told = Plan.decode(plan.read_text())
        except OSError as error:
            raise UserError(f"--plan={plan}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"--plan={plan}: {error}") from error
        check_rows(told, found, f"--rows={rows}")
    programs = out.absolute().with_name("programs")
    text = "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in {"rows": absolute(rows), "cache": str(programs)}.items()
    )
    with told_as_file_error(out), replacing(out) as temporary:
        temporary.write_text(text)
    read_settings(str(out))


def read_settings(file: str) -> dict[str, Any]:
    """Reads a client's settings.

    Args:
      file: A TOML file with ``rows``, a source of `rows.read_rows`; and with ``base``, a file of
        named arrays, where the model is public and only adapters travel. ``cache`` names a
        directory for compiled programs.

    Raises:
      UserError: It is absent, no TOML, or has other names.
    """
    if not file:
        raise UserError(f"the node's configuration has no {SETTINGS!r}: name a TOML file")
    try:
        values = tomllib.loads(user_path(file).read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}") from error
    unknown = set(values) - {"rows", "base", "cache"}
    texts = all(isinstance(value, str) for value in values.values())
    if unknown or "rows" not in values or not texts:
        raise UserError(f"{file}: allowed are rows (needed), base and cache, each a text")
    return values
