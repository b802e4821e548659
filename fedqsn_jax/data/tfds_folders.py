"""Finds data sets that TFDS has prepared, without TensorFlow and without the network.

A data set that was prepared in the array_record format can be read without TensorFlow; preparing
it needs an environment with TensorFlow, once. Files are opened by their folder.
``tfds.data_source`` would look up the data set's code first, which may download, and which answers
for absent data with an error about something else.
"""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.core.json_text import parse_json

FORMAT = "array_record"
"""The format of TFDS's files that can be read without TensorFlow."""

_DEFAULT_DIRECTORY = "~/tensorflow_datasets"


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A data set as a configuration names it.

    Attributes:
      setting: The setting that names it, for messages: ``data.name = 'mnist'``.
      folder: Its name, with the configuration's after a slash if it has any: ``glue/rte``.
      directory: Where TFDS data sets lie; empty means ``TFDS_DATA_DIR`` or TFDS's own default.
    """

    setting: str
    folder: str
    directory: str = ""

    def find(self) -> Path:
        """Returns the folder of the newest prepared version.

        Raises:
          ConfigError: There is none that can be read without TensorFlow; the message says where it
            was looked for and how to prepare one.
        """
        searched = self._root() / self.folder
        versions = sorted((i.parent for i in searched.glob("*/dataset_info.json")), key=_version)
        versions = [folder for folder in versions if _version(folder)]
        if not versions:
            raise ConfigError(f"{self.setting}: not found in {searched}; {self._how_to_prepare()}")
        for folder in reversed(versions):
            if FORMAT in _formats(folder):
                return folder
        raise ConfigError(
            f"{self.setting}: {versions[-1]} is in the format "
            f"{', '.join(_formats(versions[-1]))}, which needs TensorFlow; remove it and "
            f"{self._how_to_prepare()}"
        )

    def check_files(self, splits: Any, names: tuple[str, ...], folder: Path) -> None:
        """Makes sure that the files of splits are there.

        Args:
          splits: TFDS's ``DatasetInfo.splits``.
          names: Which of them are needed.
          folder: Where they lie.

        Raises:
          ConfigError: One is missing.
        """
        for name in names:
            for file in splits[name].filepaths:
                if not file.exists():
                    raise ConfigError(
                        f"{self.setting}: {file} is missing; remove {folder} and "
                        f"{self._how_to_prepare()}"
                    )

    @contextlib.contextmanager
    def explained(self, folder: Path) -> Iterator[None]:
        """Turns what reading damaged files raises into one line that says what to do.

        Raises:
          ConfigError: The block raised it, or an error of reading.
        """
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{self.setting}: {folder} cannot be read ({type(error).__name__}: {reason}); "
                f"remove it and {self._how_to_prepare()}"
            ) from error

    def _root(self) -> Path:
        given = self.directory or os.environ.get("TFDS_DATA_DIR") or _DEFAULT_DIRECTORY
        if "://" in given:
            raise ConfigError(f"data.directory = {given!r}: allowed is a local directory")
        return user_path(given)

    def _how_to_prepare(self) -> str:
        return (
            f"prepare it once, in an environment with TensorFlow "
            f"(pip install 'fedqsn_jax[prepare]'): tfds build {self.folder} "
            f"--data_dir={shlex.quote(str(self._root()))} --file_format={FORMAT}"
        )


def _version(folder: Path) -> tuple[int, ...]:
    """``(3, 0, 1)``; empty for a folder that is none, such as one that is still being written."""
    parts = folder.name.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _formats(folder: Path) -> list[str]:
    file = folder / "dataset_info.json"
    try:
        info = parse_json(file.read_text())
        # The first is left out where it is TFDS's default.
        return [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.directory: {file} cannot be read ({reason})") from error
