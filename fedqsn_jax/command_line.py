"""The command line's part of a configuration: files under ``configs/`` and ``--config.FIELD``.

A configuration file defines ``get_config()`` or ``get_config(algorithm)`` and returns what
`config.default_config` made, changed. Every mistake is a `ConfigError` of one line.
"""

import argparse
import ast
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections

from fedqsn_jax.config import Config, ConfigError, flatten, resolve, unknown_field

PACKAGED_CONFIGS = Path(__file__).parent / "configs"
"""The copies of ``configs/`` that an installed package carries."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`, and whose options cannot be shortened."""

    def __init__(self, description: str, epilog: str = "") -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise ConfigError(message)


def read_config(name: str | None, overrides: Sequence[str]) -> Config:
    """Reads a configuration file and applies overrides.

    Args:
      name: ``PATH`` or ``PATH:ARGUMENT``; the argument goes to ``get_config``. A path
        ``configs/X.py`` that does not exist means the package's own copy.
      overrides: Arguments of the form ``--config.FIELD=VALUE``, values as Python literals.

    Raises:
      ConfigError: Anything that is wrong with either.
    """
    if not name:
        raise ConfigError("no --config: name a file, for example --config=configs/digits.py")
    path, _, argument = name.partition(":")
    values = _call(_load_get_config(_find(path)), path, argument)
    for override in overrides:
        _apply(values, override)
    return resolve(values)


def _find(path: str) -> Path:
    given = Path(path)
    if given.is_file():
        return given
    packaged = PACKAGED_CONFIGS / given.name
    if given.parent == Path("configs") and packaged.is_file():
        return packaged
    known = sorted(p.stem for p in PACKAGED_CONFIGS.glob("*.py"))
    carried = f"; the package carries configs/{{{','.join(known)}}}.py" if known else ""
    raise ConfigError(f"--config={path}: no such file{carried}")


def _load_get_config(path: Path) -> Callable[..., Any]:
    specification = importlib.util.spec_from_file_location("fedqsn_jax_user_config", path)
    if specification is None or specification.loader is None:
        raise ConfigError(f"--config={path}: not a Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--config={path}: {_one_line(error)}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"--config={path}: it defines no function get_config")
    return get_config


def _call(get_config: Callable[..., Any], path: str, argument: str) -> dict[str, Any]:
    if argument and not inspect.signature(get_config).parameters:
        raise ConfigError(f"--config={path}:{argument}: its get_config takes no argument")
    try:
        values = get_config(argument) if argument else get_config()
    except Exception as error:
        raise ConfigError(f"--config={path}: {_one_line(error)}") from error
    if not isinstance(values, ml_collections.ConfigDict):
        raise ConfigError(f"--config={path}: get_config returned no ConfigDict")
    return values.to_dict()


def _apply(values: dict[str, Any], override: str) -> None:
    option, separator, text = override.partition("=")
    name = option.removeprefix("--config.")
    if not option.startswith("--config.") or not name:
        raise ConfigError(f"unexpected argument {override}")
    if not separator:
        raise ConfigError(f"{override}: a value is missing; write {override}=VALUE")
    defaults = flatten(Config())
    fields = [known for known in defaults if known.startswith(f"{name}.")]
    if fields:
        raise ConfigError(f"{name}: it is a section; name one of its fields, such as {fields[0]}")
    if name not in defaults:
        raise unknown_field(name)
    section, _, field = name.rpartition(".")
    if section:
        values = values.setdefault(section, {})
    values[field] = text if isinstance(defaults[name], str) else _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
