"""A client's own settings: a TOML file that names its rows, written and read."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.deploy.client import check_rows, make_client
from fedqsn_jax.deploy.client_model import read_base
from fedqsn_jax.deploy.outcome import SETTINGS
from fedqsn_jax.deploy.plan import Plan
from fedqsn_jax.deploy.rows import absolute, is_text, read_rows
from fedqsn_jax.host.atomic_files import replacing, told_as_file_error

_NAMES = frozenset({"rows", "base", "cache", "received", "tokenizer"})


def write_client(
    rows: str,
    out: Path,
    plan: Path | None = None,
    *,
    tokenizer: Path | None = None,
    base: Path | None = None,
) -> None:
    """Writes a client's settings, after its rows were read and found right.

    Args:
      rows: Where its rows are, as `rows.read_rows` takes it.
      out: The file to write.
      plan: The server's ``plan.json``, to which the rows are to fit; None: they are only read.
      tokenizer: For texts the server's ``tokenizer.json``; None: the one beside the plan.
      base: Where the model is public and only a part of it travels, the rest of it: the server's
        ``base.npz``, or a language model's directory.

    Raises:
      UserError: The rows cannot be read or do not fit, or the plan is of another version.
    """
    values = {"rows": absolute(rows), "cache": str(out.absolute().with_name("programs"))}
    if plan is None:
        if is_text(rows):
            raise UserError(f"--rows={rows}: texts need --plan, which says how they are tokenized")
        read_rows(rows, "--rows")
    else:
        told = _read_plan(plan)
        if is_text(rows):
            file = (tokenizer or plan.with_name("tokenizer.json")).absolute()
            values["tokenizer"] = str(file)
        check_rows(told, own_rows(told, {**values, "rows": rows}, "--rows"), f"--rows={rows}")
        if base is not None:
            values["base"] = str(base.absolute())
            make_client(told, read_base(told, str(base)))
    text = "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items()
    )
    with told_as_file_error(out), replacing(out) as temporary:
        temporary.write_text(text)
    read_settings(str(out))


def own_rows(plan: Plan, settings: Mapping[str, str], option: str = "rows") -> Mapping[str, Any]:
    """Reads the rows that a client's settings name.

    Args:
      plan: What the server says of the federation.
      settings: The client's.
      option: Where the user has named the rows, for messages.

    Raises:
      UserError: They cannot be read.
    """
    source = settings["rows"]
    if not is_text(source):
        return read_rows(source, option)
    # Only here: images do without what texts need, which takes a second to import.
    from fedqsn_jax.deploy.texts import read_texts

    cache = str(user_path(settings["cache"]) / "texts") if "cache" in settings else ""
    return read_texts(plan, source, settings.get("tokenizer", ""), cache)


def _read_plan(file: Path) -> Plan:
    try:
        return Plan.decode(file.read_text())
    except OSError as error:
        raise UserError(f"--plan={file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--plan={file}: {error}") from error


def read_settings(file: str) -> dict[str, Any]:
    """Reads a client's settings.

    Args:
      file: A TOML file with ``rows``, a source of `rows.read_rows` or of texts; for texts with
        ``tokenizer``, the server's file. Where the model is public and only adapters travel,
        ``base`` is a file of named arrays or a language model's directory. ``cache`` names a
        directory for compiled programs and tokenized rows, and ``received`` one for payloads that
        are sent once; by default it lies beside the file.

    Raises:
      UserError: It is absent, no TOML, or has other names.
    """
    if not file:
        raise UserError(f"the node's configuration has no {SETTINGS!r}: name a TOML file")
    try:
        values = tomllib.loads(user_path(file).read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}") from error
    unknown = set(values) - _NAMES
    texts = all(isinstance(value, str) for value in values.values())
    others = ", ".join(sorted(_NAMES - {"rows"}))
    if unknown or "rows" not in values or not texts:
        raise UserError(f"{file}: allowed are rows (needed), {others}, each a text")
    return {"received": str(user_path(file).absolute().with_name("received")), **values}
