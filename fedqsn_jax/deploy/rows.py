"""A party's own rows, named in its own settings and never by the other side.

``npz:FILE`` reads named arrays; ``python:FILE.py:FUNCTION`` calls a function of the user's that
returns them.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.errors import UserError

TEXT_KINDS = ("tsv", "jsonl", "e2e", "tfds")
"""Sources of texts: those of a simulation, see `data.text.sources`."""


def read_rows(source: str, option: str = "rows") -> dict[str, np.ndarray]:
    """Returns named arrays ``[rows, ...]``.

    Args:
      source: ``npz:FILE`` or ``python:FILE.py:FUNCTION``.
      option: Where the user has named it, for messages.

    Raises:
      UserError: The source is of another form, absent, or gives something else.
    """
    kind, _, rest = source.partition(":")
    if kind == "npz":
        return _from_npz(f"{option}={source}", user_path(rest))
    if kind == "python" and ":" in rest:
        file, _, function = rest.rpartition(":")
        return _from_function(f"{option}={source}", user_path(file), function)
    raise UserError(
        f"{option}={source}: allowed are npz:FILE and python:FILE.py:FUNCTION, and "
        f"for texts {', '.join(f'{name}:...' for name in TEXT_KINDS)}"
    )


def is_text(source: str) -> bool:
    """Whether a source gives texts, which a tokenizer is needed for; see `texts`."""
    return source.partition(":")[0] in TEXT_KINDS


def absolute(source: str) -> str:
    """Returns a source of `read_rows` that means the same in every working directory."""
    kind, _, rest = source.partition(":")
    if kind == "tfds":
        return source
    file, colon, function = rest.rpartition(":") if kind == "python" else (rest, "", "")
    return f"{kind}:{user_path(file).absolute()}{colon}{function}"


def _from_npz(where: str, file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from error


def _from_function(where: str, file: Path, function: str) -> dict[str, np.ndarray]:
    spec = importlib.util.spec_from_file_location("fedqsn_rows", file)
    if spec is None or spec.loader is None or not file.exists():
        raise UserError(f"{where}: there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, function, None)
        rows = found() if callable(found) else None
    except Exception as error:
        text = " ".join(str(error).split())
        raise UserError(f"{where}: it fails with {type(error).__name__}: {text}") from error
    if not callable(found):
        raise UserError(f"{where}: {file} has no function {function!r}")
    if not isinstance(rows, Mapping):
        raise UserError(f"{where}: it returned no dictionary of arrays")
    return {str(name): np.asarray(array) for name, array in rows.items()}
