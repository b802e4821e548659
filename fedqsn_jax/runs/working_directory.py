"""The directory of a run: whose it is, who may read it, and which configuration made it."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import Config, ConfigError, flatten, resolve, to_dict
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.core.json_text import parse_json
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.runs.claims import (
    PRIVATE,
    check_free,
    claim_directory,
)
from fedqsn_jax.runs.disk_space import check_writable

try:
    import fcntl
except ImportError:  # Not everywhere; there, two runs are not kept apart.
    fcntl = None  # type: ignore[assignment]

_CONFIG_FILE = "config.json"
_PRIVACY_FILE = "privacy.json"
_ROWS_FILE = "rows.sha256"
_OWN_MODEL = "own_model"
_AT_THE_END = ("rounds", "evaluation.fine_tuned_attackers")
"""Fields that change nothing of what was run so far."""


@dataclasses.dataclass(frozen=True)
class WorkDirectory:
    """Names of what a run writes. The directory holds the hidden model: mode 0700.

    Attributes:
      path: Where it is.
      own_model: Of a user's own model its tensors, a text each; None: a model of the package.
    """

    path: Path
    own_model: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Expands ``~``.

        Raises:
          UserError: There is no such home directory.
        """
        object.__setattr__(self, "path", user_path(self.path))

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints of the server's state."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object for each evaluated round."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The final table as JSON."""
        return self.path / "summary.json"

    @property
    def texts(self) -> Path:
        """What the views wrote after the last round, where the task is to write."""
        return self.path / "texts.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        """What lay beside the pre-trained model's weights: its config.json and its tokenizer."""
        return self.path / "model"

    @property
    def picture(self) -> Path:
        """The curves of all views."""
        return self.path / "accuracy.png"

    def check(self, config: Config) -> None:
        """Makes sure, without writing anything, that the directory can serve this configuration.

        Raises:
          ConfigError: Another run is at work in it, or as `check_fit` does.
        """
        check_free(self.path)
        self.check_fit(config)

    def check_fit(self, config: Config) -> None:
        """Makes sure that the directory is, or could become, one of this configuration's.

        Fields that have no effect may differ. Nothing is written, and a run may be at work in it
        meanwhile.

        Raises:
          ConfigError: It belongs to another configuration, holds other things, or cannot be
            written.
        """
        try:
            self._check_contents(config)
        except OSError as error:
            raise ConfigError(f"--workdir={self.path}: {error.strerror}") from error

    def _check_contents(self, config: Config) -> None:
        path = self.path
        check_writable(path)
        stored = self._stored()
        if stored is None:
            if path.exists() and any(self.path.iterdir()):
                raise ConfigError(
                    f"--workdir={path}: it holds other files and no {_CONFIG_FILE}; "
                    f"name a new or empty directory"
                )
            return
        self._compare_models(stored.pop(_OWN_MODEL, None))
        self._compare(stored, config)

    def what_remains(self) -> str:
        """Returns what an interrupted run leaves to the same command, in words.

        It may be called at any time: it waits for no save, and only reads names. (A checkpoint is a
        directory that is called by its round, once it is whole.)
        """
        rounds = self.saved_rounds()
        if not rounds:
            return "nothing was saved, the same command starts again"
        return f"the same command resumes after round {max(rounds)}, the last that was saved"

    def saved_rounds(self) -> list[int]:
        """Returns the rounds that have a whole checkpoint, in no order."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return [int(name) for name in names if name.isdecimal()]

    @contextmanager
    def claim(self, config: Config) -> Iterator[None]:
        """Creates the directory, or makes an existing one private, and keeps other runs out of it.

        A directory that was created, and in which nothing was written, is removed at the end.
        Other runs are kept out while the ``with`` block runs, by a lock on the directory itself: it
        leaves nothing behind, and ends with the process however that ends. It is advisory; file
        systems that have no such locks are taken as they are.

        Raises:
          ConfigError: Another run is at work in it, it does not serve this configuration (any
            more), or the file system refuses.
        """
        with claim_directory(self.path):
            # Another run may have been at work since the caller has looked.
            self.check_fit(config)
            yield

    def config(self) -> Config:
        """Returns the configuration that made the directory.

        Raises:
          ConfigError: There is none, or it is not one that this version knows.
        """
        stored = self._stored()
        if stored is None:
            raise ConfigError(f"--workdir={self.path}: there is no run in it, no {_CONFIG_FILE}")
        stored.pop(_OWN_MODEL, None)
        try:
            return resolve(stored)
        except UserError as error:
            raise ConfigError(f"--workdir={self.path}: {_CONFIG_FILE}: {error}") from error

    def write_config(self, config: Config) -> None:
        """Writes the configuration, all of it or nothing.

        Raises:
          ConfigError: The file system refuses.
        """
        values: dict[str, Any] = to_dict(config)
        if self.own_model is not None:
            values[_OWN_MODEL] = list(self.own_model)
        self._write(_CONFIG_FILE, json.dumps(values, indent=2))

    def write_noise(self, noise: float) -> None:
        """Writes the noise multiplier of the run, with which it goes on, also where it is extended.

        Raises:
          ConfigError: The file system refuses.
        """
        self._write(_PRIVACY_FILE, json.dumps({"noise": noise}))

    def noise(self) -> float | None:
        """Returns the noise multiplier with which the run was begun; None: there is none.

        Raises:
          ConfigError: It cannot be read.
        """
        file = self.path / _PRIVACY_FILE
        try:
            return float(json.loads(file.read_text())["noise"]) if file.exists() else None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"--workdir={self.path}: {_PRIVACY_FILE} cannot be read: the noise of the rounds "
                f"so far is not known"
            ) from error

    def write_rows(self, fingerprint: str) -> None:
        """Writes what tells the rows of the run from others; see `data.splits.fingerprint`.

        Raises:
          ConfigError: The file system refuses.
        """
        self._write(_ROWS_FILE, fingerprint)

    def check_rows(self, fingerprint: str) -> None:
        """Makes sure that a run goes on with the rows that it has begun with.

        Raises:
          ConfigError: Its rows were others, or the file system refuses.
        """
        file = self.path / _ROWS_FILE
        try:
            # Runs of earlier versions have none.
            stored = file.read_bytes().strip() if file.exists() else fingerprint.encode()
        except OSError as error:
            raise ConfigError(f"--workdir={self.path}: {_ROWS_FILE}: {error.strerror}") from error
        if re.fullmatch(rb"[0-9a-f]{64}", stored) is None:
            raise ConfigError(
                f"--workdir={self.path}: {_ROWS_FILE} is damaged; if the data are those with which "
                f"the run was begun, remove that file"
            )
        if stored != fingerprint.encode():
            raise ConfigError(
                f"--workdir={self.path}: the rows are not those with which the run was begun; "
                f"allowed are the same data, or another directory"
            )

    def _write(self, name: str, content: str) -> None:
        try:
            with replacing(self.path / name) as temporary:
                temporary.write_text(content + "\n")
        except OSError as error:
            raise ConfigError(f"--workdir={self.path}: {error.strerror}") from error

    def keep_files(self, files: Sequence[Path]) -> None:
        """Keeps copies of files in `model`, each whole or not at all, one after the other.

        So the hidden model can be exported wherever its directory is by then.

        Raises:
          ConfigError: The file system refuses.
        """
        try:
            for file in files:
                self.model.mkdir(mode=PRIVATE, exist_ok=True)
                with replacing(self.model / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        except OSError as error:
            raise ConfigError(f"--workdir={self.path}: model: {error.strerror}") from error

    def _stored(self) -> dict[str, Any] | None:
        file = self.path / _CONFIG_FILE
        if not file.exists():
            return None
        try:
            return dict(parse_json(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"--workdir={self.path}: {_CONFIG_FILE} cannot be read") from error

    def _compare_models(self, stored: list[str] | None) -> None:
        """Makes sure that the model is the one that the run was begun with, by its tensors."""
        ours, theirs = (set(model or ()) for model in (self.own_model, stored))
        if (self.own_model is None) != (stored is None):
            kinds = {True: "a model of one's own, by federate", False: "a model of the package"}
            raise ConfigError(
                f"--workdir={self.path}: its run is of {kinds[stored is not None]}; allowed is "
                f"such a one, or another directory"
            )
        if ours != theirs:
            raise ConfigError(
                f"--workdir={self.path}: it was made with another model: "
                f"{', '.join(sorted(ours - theirs)) or 'nothing more'} (there: "
                f"{', '.join(sorted(theirs - ours)) or 'nothing more'})"
            )

    def _compare(self, stored: dict[str, Any], config: Config) -> None:
        ours = {name: _as_json(value) for name, value in flatten(config).items()}
        # A run from before a field existed did what its default says.
        defaults = {name: _as_json(value) for name, value in flatten(Config()).items()}
        theirs = {**defaults, **_flatten(stored)}
        differing = {
            name
            for name in ours.keys() | theirs.keys()
            if name not in _AT_THE_END and ours.get(name) != theirs.get(name)
        }
        if differing:
            # Only now, as it waits for JAX. What decides on other fields' effect is compared, too.
            from fedqsn_jax.simulation.unused_settings import without_effect

            differing -= without_effect(config)
        if differing:
            raise ConfigError(
                f"--workdir={self.path}: it was made with another configuration: "
                + ", ".join(
                    f"{name} = {ours.get(name)!r} (there: {theirs.get(name)!r})"
                    for name in sorted(differing)
                )
            )
        if config.rounds < theirs.get("rounds", 0):
            raise ConfigError(
                f"rounds = {config.rounds}: the run in {self.path} has {theirs['rounds']}; "
                f"allowed are as many or more"
            )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
