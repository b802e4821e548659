"""The command line's part of a configuration: files under ``configs/`` and ``--config.FIELD``.

``ml_collections.config_flags`` reads such flags too. With it a mistake would no longer be answered
by one line that names what is allowed, with exit code 2: absl answers a wrong type by two lines
without that, and an unknown field by a traceback. Its flags belong to the process, where a sweep,
tests and notebooks read several configurations one after the other.

A configuration file defines ``get_config()`` or ``get_config(algorithm)`` and returns what
`config.default_config` made, changed. Every mistake is a `ConfigError` of one line.
"""

import argparse
import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import Config, ConfigError, flatten, resolve, unknown_field

PACKAGED_CONFIGS = Path(__file__).parent.parent / "configs"
"""The copies of ``configs/`` that an installed package carries."""
_MODULE = "fedqsn_jax_user_config"
"""What a file of settings is called as a module."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`, and whose options cannot be shortened.

    Its help keeps the lines of descriptions, and names the command as users type it.
    """

    def __init__(self, description: str = "", epilog: str = "", prog: str | None = None) -> None:
        super().__init__(
            prog=prog or _command(),
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise ConfigError(message)


def _command() -> str | None:
    """``python -m fedqsn_jax.NAME`` where this process is such a command, otherwise None."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else ""
    return f"python -m {name}" if name.startswith("fedqsn_jax.") else None


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
    path, argument = _split(name)
    option = f"--config={path}"
    get_config = load_function(find_file(path, option), "get_config", option)
    values = _call(get_config, path, argument)
    for override in overrides:
        _apply(values, override)
    return resolve(values)


def chosen_fields(overrides: Sequence[str]) -> list[str]:
    """Returns the dotted names of the fields that overrides set; see `read_config`."""
    return [text.partition("=")[0].removeprefix("--config.") for text in overrides]


def _split(name: str) -> tuple[str, str]:
    """Splits a file's path and its argument; the path may have colons where such a file exists."""
    ends = [end for end, letter in enumerate(name + ":") if letter == ":"]
    end = next((end for end in reversed(ends) if Path(name[:end]).is_file()), ends[0])
    return name[:end], name[end + 1 :]


def find_file(path: str, option: str) -> Path:
    """Finds a file of settings: where it is said to be, or the package's copy of ``configs/...``.

    Args:
      path: What the user wrote.
      option: The option, as the user wrote it; mistakes are told with it.

    Raises:
      ConfigError: There is no such file.
    """
    given = user_path(path)
    if given.is_file():
        return given
    inside = given.parts[:1] == ("configs",)
    packaged = PACKAGED_CONFIGS.joinpath(*given.parts[1:])
    if inside and packaged.is_file():
        return packaged
    folder = given.parent if inside and packaged.parent.is_dir() else Path("configs")
    known = sorted(p.stem for p in PACKAGED_CONFIGS.joinpath(*folder.parts[1:]).glob("*.py"))
    carried = f"; the package carries {folder}/{{{','.join(known)}}}.py" if known else ""
    raise ConfigError(f"{option}: no such file{carried}")


def load_function(path: Path, name: str, option: str) -> Callable[..., Any]:
    """Returns a function that a file of settings defines.

    Args:
      path: The file, which is run.
      name: The function's name.
      option: The option, as the user wrote it; mistakes are told with it.

    Raises:
      ConfigError: The file fails, or defines no such function.
    """
    specification = importlib.util.spec_from_file_location(_MODULE, path)
    if specification is None or specification.loader is None:
        raise ConfigError(f"{option}: not a Python file")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses and type hints look their module up there, also when the function is called.
    sys.modules[_MODULE] = module
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[_MODULE]
        raise ConfigError(f"{option}: {one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{option}: it defines no function {name}")
    return function


def _call(get_config: Callable[..., Any], path: str, argument: str) -> dict[str, Any]:
    if argument and not inspect.signature(get_config).parameters:
        raise ConfigError(f"--config={path}:{argument}: its get_config takes no argument")
    try:
        values = get_config(argument) if argument else get_config()
    except ConfigError as error:
        given = f"{path}:{argument}" if argument else path
        raise ConfigError(f"--config={given}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--config={path}: {one_line(error)}") from error
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
    values[field] = text if isinstance(defaults[name], str) else literal(text)


def literal(text: str) -> Any:
    """Returns the value of a Python literal, and any other text as it is.

    So is a number that is too small for Python, which would take it for zero.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    digits = text.lower().partition("e")[0]
    became_zero = isinstance(value, float) and value == 0 and any(d in digits for d in "123456789")
    return text if became_zero else value


def one_line(error: BaseException) -> str:
    """Returns an error's kind and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
