"""A run's hidden model for the transformers library: ``python -m fedqsn_jax.export``.

  python -m fedqsn_jax.export --workdir=DIR --out=DIR2 [--round=N]

reads the run's latest checkpoint, or that of a round, and writes ``model.safetensors``,
``config.json`` and the tokenizer's files, of which the run has kept those of its pre-trained model.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedqsn_jax.host import signals

if TYPE_CHECKING:
    from fedqsn_jax.config.schema import Config
    from fedqsn_jax.runs.working_directory import WorkDirectory

_MODEL_FILES = ("config.json", "model.safetensors")


class Exported(NamedTuple):
    """What was written.

    Attributes:
      round: The round whose model it is.
      architecture: The transformers library's class that reads it.
      unread: Names of tensors that this class has no place for, and ignores.
    """

    round: int
    architecture: str
    unread: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: What follows the program's name; by default the process's own.

    Returns:
      The exit code: 0; `signals.REFUSED` or `signals.INTERRUPTED`, told in one line.
    """
    return signals.answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    # Imports stand here, and below, so that a Ctrl-C during them is no traceback.
    from fedqsn_jax.config.command_line import Parser
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.core.errors import UserError

    parser = Parser("Writes a run's hidden model so that the transformers library reads it.")
    parser.add_argument("--workdir", help="the directory of the run")
    parser.add_argument("--out", help="a new directory for the model; it is made private")
    parser.add_argument("--round", type=int, help="the round of the checkpoint; the latest")
    try:
        options = parser.parse_args(arguments)
        for name in ("workdir", "out"):
            if not getattr(options, name):
                raise ConfigError(f"no --{name}: name a directory")
        # Only now, so that mistakes are answered without waiting for JAX.
        from fedqsn_jax.host.checkpoints import CheckpointError
        from fedqsn_jax.reporting.display import Display
    except UserError as error:
        return signals.refuse(error)
    try:
        exported = export(Path(options.workdir), Path(options.out), options.round)
    except (UserError, CheckpointError) as error:
        return signals.refuse(error)
    display = Display()
    display.message(
        f"{options.out}: the hidden model after round {exported.round}; only you may read it"
    )
    if exported.unread:
        display.message(
            f"transformers' {exported.architecture} does not load {', '.join(exported.unread)}, "
            f"which classify the mean of its hidden states; fedqsn_jax loads the directory whole"
        )
    return 0


def export(workdir: Path, out: Path, round: int | None = None) -> Exported:
    """Writes the hidden model of a run that started from a pre-trained language model.

    An export that fails or is interrupted leaves nothing in ``out``.

    Args:
      workdir: The directory of the run.
      out: Where to write; a new or empty directory.
      round: The round of the checkpoint; None is the latest.

    Raises:
      ConfigError: The directories are not what they should be.
      CheckpointError: The checkpoint cannot be read.
    """
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.core.trees import leaves_by_path
    from fedqsn_jax.host.checkpoints import Checkpoints
    from fedqsn_jax.models.language.pretrained import (
        description_files,
        nested,
        read_config,
        save_pretrained,
    )
    from fedqsn_jax.runs.working_directory import WorkDirectory
    from fedqsn_jax.simulation.configured import merge_configured

    work, out = WorkDirectory(workdir), user_path(out)
    source, run = _read_run(work)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out}: it is not empty; name a new or empty directory")
    with Checkpoints(work.checkpoints, keep_latest=1, keep_best=0) as checkpoints:
        tensors, _, finished = checkpoints.read("params", round)
    directory = _description(work, source)
    config = read_config(directory)
    tensors = leaves_by_path(merge_configured(run, nested(tensors)))
    overrides = {k: v for k, v in _settings_of(tensors).items() if hasattr(config, k)}
    config = read_config(directory, **overrides)
    *beside, _ = description_files(directory)
    with _all_or_nothing(out, [*_MODEL_FILES, *(file.name for file in beside)]):
        save_pretrained(out, config, nested(tensors))
        for file in beside:
            shutil.copyfile(file, out / file.name)
    written = config.to_settings()["architectures"][0]
    return Exported(finished, written, getattr(config, "unread", ()))


def _description(work: "WorkDirectory", source: str) -> Path:
    """Where a run's model has its config.json and its tokenizer: the run's copy, or the source."""
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.core.errors import UserError
    from fedqsn_jax.models.language.pretrained import directory_of

    if (work.model / "config.json").is_file():
        return work.model
    # Runs of earlier versions kept no copy.
    try:
        return directory_of(source)
    except UserError as error:
        raise ConfigError(
            f"--workdir={work.path}: the run has no copy of its model's config.json, and {error}; "
            f"a relative directory is sought from here, so export where the run was started"
        ) from error


@contextlib.contextmanager
def _all_or_nothing(out: Path, names: Sequence[str]) -> Iterator[None]:
    """Leaves no file of a model where the block or the process ends before all are written.

    Args:
      out: Where the block writes; empty, or a directory that the block makes. In that case it is
        removed too, with those above it that were made for it.
      names: The files that it writes there.
    """
    from fedqsn_jax.runs.working_directory import missing_directories, remove_empty

    created = missing_directories(out)
    complete = False

    def forget() -> None:
        if not complete:
            for name in names:
                (out / name).unlink(missing_ok=True)
            remove_empty(created)

    with signals.cleaning_up(forget):
        yield
        complete = True


def _read_run(work: "WorkDirectory") -> tuple[str, "Config"]:
    """Where a run's pre-trained model came from, and its settings of adapters."""
    from fedqsn_jax.config.schema import ConfigError, resolve

    file = work.path / "config.json"
    try:
        values = json.loads(file.read_text())
        source = values["model"]["pretrained"]
    except FileNotFoundError as error:
        raise ConfigError(f"--workdir={work.path}: there is no run in it") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--workdir={work.path}: config.json cannot be read") from error
    except (KeyError, TypeError):
        source = ""
    if not source or not isinstance(source, str):
        raise ConfigError(
            f"--workdir={work.path}: its model is not a pre-trained language model; only such "
            f"(model.pretrained) can be exported"
        )
    if values.get("algorithm") == "fedsp":
        raise ConfigError(
            f"--workdir={work.path}: fedsp tunes prompts, and leaves its model as it was; what it "
            f"has tuned is in fedqsn_jax.load(...).params"
        )
    adapters = {name: values[name] for name in ("lora", "site_rules") if name in values}
    return source, resolve(adapters)


def _settings_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What a run may have chosen otherwise than the file that it started from says."""
    bias = tensors.get("classifier/out/bias")
    return {
        "classes": 0 if bias is None else bias.shape[0],
        "pooling": "cls" if "classifier/dense/kernel" in tensors else "mean",
        "tied": "lm_head/kernel" not in tensors,
    }
