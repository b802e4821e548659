"""A run's hidden model as files that others read: ``python -m fedqsn_jax.export``.

  python -m fedqsn_jax.export --workdir=DIR --out=DIR2 [--round=best|last|N]

reads the run's latest checkpoint, its best or that of a round. Of a pre-trained language model it
writes what the transformers library reads: ``model.safetensors``, ``config.json`` and the
tokenizer's files, of which the run has kept those of its pre-trained model. Of any other model it
writes ``model.safetensors`` and ``model.json``, which `models.parameter_files.load_params` reads.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedqsn_jax.host import signals

if TYPE_CHECKING:
    from fedqsn_jax.config.schema import Config
    from fedqsn_jax.runs.working_directory import WorkDirectory

_SCORES = ("global/accuracy", "global/token_accuracy")
"""What tasks are scored by, in a run's metrics."""

_SIZES = {"mlp": ("hidden",), "cnn": ("channels", "dense"), "resnet18": ("width", "stem")}
"""The sizes of each image model, by their names in a configuration."""

_MODEL_FILES = ("config.json", "model.safetensors")


class Exported(NamedTuple):
    """What was written.

    Attributes:
      round: The round whose model it is.
      architecture: The transformers library's class that reads it; empty: none does.
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

    parser = Parser("Writes a run's hidden model as safetensors, with what says how to read them.")
    parser.add_argument("--workdir", help="the directory of the run")
    parser.add_argument("--out", help="a new directory for the model; it is made private")
    parser.add_argument("--round", default="last", help="of the checkpoint: best, last or a number")
    try:
        options = parser.parse_args(arguments)
        for name in ("workdir", "out"):
            if not getattr(options, name):
                raise ConfigError(f"no --{name}: name a directory")
        which = _round_of(options.round)
        # Only now, so that mistakes are answered without waiting for JAX.
        from fedqsn_jax.host.checkpoints import CheckpointError
        from fedqsn_jax.reporting.display import Display
    except UserError as error:
        return signals.refuse(error)
    try:
        exported = export(Path(options.workdir), Path(options.out), which)
    except (UserError, CheckpointError) as error:
        return signals.refuse(error)
    display = Display()
    display.message(
        f"{options.out}: the hidden model after round {exported.round}; only you may read it"
    )
    if not exported.architecture:
        display.message("fedqsn_jax.models.parameter_files.load_params reads it")
    if exported.unread:
        display.message(
            f"transformers' {exported.architecture} does not load {', '.join(exported.unread)}, "
            f"which classify the mean of its hidden states; fedqsn_jax loads the directory whole"
        )
    return 0


def _round_of(text: str) -> int | str | None:
    """What ``--round`` asks for."""
    from fedqsn_jax.config.schema import ConfigError

    if text in ("best", "last"):
        return None if text == "last" else text
    if not text.isdecimal():
        raise ConfigError(f"--round={text}: allowed are best, last or the number of a round")
    return int(text)


def export(workdir: Path, out: Path, round: int | str | None = None) -> Exported:
    """Writes the hidden model of a run.

    An export that fails or is interrupted leaves nothing in ``out``.

    Args:
      workdir: The directory of the run.
      out: Where to write; a new or empty directory.
      round: The round of the checkpoint; None is the latest, and ``best`` that of the kept ones
        whose hidden model scored best.

    Raises:
      ConfigError: The directories are not what they should be.
      CheckpointError: The checkpoint cannot be read.
    """
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.core.trees import leaves_by_path
    from fedqsn_jax.host.devices import computing
    from fedqsn_jax.models.language.pretrained import nested
    from fedqsn_jax.runs.working_directory import WorkDirectory
    from fedqsn_jax.simulation.from_config import merge_configured

    work, out = WorkDirectory(workdir), user_path(out)
    run = _read_run(work)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out}: it is not empty; name a new or empty directory")
    with computing():
        tensors, finished = _tensors(work, round)
        tensors = leaves_by_path(merge_configured(run.adapters, nested(tensors)))
    if not run.source:
        _write_plain(out, run, tensors, finished)
        return Exported(finished, "", ())
    return _write_language_model(work, out, run, tensors)._replace(round=finished)


def _tensors(work: "WorkDirectory", round: int | str | None) -> tuple[dict[str, Any], int]:
    """The hidden model of a checkpoint, by path, and its round."""
    from fedqsn_jax.host.checkpoints import Checkpoints

    with Checkpoints(work.checkpoints, keep_latest=1, keep_best=0) as checkpoints:
        tensors, history, finished = checkpoints.read(
            "params", None if isinstance(round, str) else round
        )
        if isinstance(round, str):
            best = _best_round(history, checkpoints.rounds())
            if best not in (None, finished):
                tensors, _, finished = checkpoints.read("params", best)
    return tensors, finished


def _best_round(history: Sequence[Mapping[str, Any]], rounds: Sequence[int]) -> int | None:
    """The round of those with a checkpoint at which the hidden model scored best, or the later."""
    scores = {
        entry["round"]: entry[name]
        for entry in history
        for name in _SCORES
        if entry.get("round") in rounds and entry.get(name) is not None
    }
    real = {round: score for round, score in scores.items() if not math.isnan(score)}
    return max(real, key=lambda round: (real[round], round), default=None)


def _write_plain(out: Path, run: "_Run", tensors: Mapping[str, Any], finished: int) -> None:
    """Writes tensors and what they are, for no library in particular."""
    from fedqsn_jax.models.language.pretrained import nested
    from fedqsn_jax.models.parameter_files import DESCRIPTION, save_params

    head = tensors.get("head/bias")
    about = {"round": finished, "model": run.model}
    if run.model and head is not None:
        about["classes"] = len(head)
    with _all_or_nothing(out, [DESCRIPTION, "model.safetensors"]):
        save_params(out, nested(dict(tensors)), about)


def _write_language_model(
    work: "WorkDirectory", out: Path, run: "_Run", tensors: Mapping[str, Any]
) -> Exported:
    """Writes what the transformers library reads."""
    from fedqsn_jax.models.language.pretrained import (
        description_files,
        nested,
        read_config,
        save_pretrained,
    )

    directory = _description(work, run.source)
    config = read_config(directory)
    chosen = _settings_of(tensors)
    if len(run.labels) == chosen["classes"]:
        chosen["labels"] = run.labels
    config = read_config(directory, **{k: v for k, v in chosen.items() if hasattr(config, k)})
    *beside, _ = description_files(directory)
    with _all_or_nothing(out, [*_MODEL_FILES, *(file.name for file in beside)]):
        save_pretrained(out, config, nested(dict(tensors)))
        for file in beside:
            shutil.copyfile(file, out / file.name)
    written = config.to_settings()["architectures"][0]
    return Exported(0, written, getattr(config, "unread", ()))


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
    from fedqsn_jax.runs.claims import missing_directories, remove_empty

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


class _Run(NamedTuple):
    """What an export needs of a run's configuration.

    Attributes:
      source: Where its pre-trained language model came from; empty: its model is another.
      model: That one's name and sizes; empty for users' own.
      labels: The names of the task's classes, where it has any.
      adapters: A configuration with the run's settings of adapters, all else by default.
    """

    source: str
    model: dict[str, Any]
    labels: tuple[str, ...]
    adapters: "Config"


def _read_run(work: "WorkDirectory") -> _Run:
    """Reads a run's config.json, as any version wrote it."""
    from fedqsn_jax.config.schema import ConfigError, resolve
    from fedqsn_jax.core.json_text import parse_json

    file = work.path / "config.json"
    try:
        values = dict(parse_json(file.read_text()))
        model = dict(values.get("model") or {})
    except FileNotFoundError as error:
        raise ConfigError(f"--workdir={work.path}: there is no run in it") from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--workdir={work.path}: config.json cannot be read") from error
    if values.get("algorithm") == "fedsp":
        raise ConfigError(
            f"--workdir={work.path}: fedsp tunes prompts, and leaves its model as it was; what it "
            f"has tuned is in fedqsn_jax.load(...).params"
        )
    adapters = {name: values[name] for name in ("lora", "site_rules") if name in values}
    sizes = {name: model[name] for name in _SIZES.get(model.get("name", ""), ()) if name in model}
    return _Run(
        str(model.get("pretrained") or ""),
        {"name": model["name"]} | sizes if sizes else {},
        _labels(values.get("data") or {}),
        resolve(adapters),
    )


def _labels(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a text task's classes; none where the configuration does not say them."""
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.data.text.loading import TextSettings, text_format

    names = [field.name for field in dataclasses.fields(TextSettings) if field.name in data]
    values = {"task": "", "train": ""} | {name: data[name] for name in names}
    settings: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return text_format(TextSettings(**settings)).labels
    except (ConfigError, TypeError):
        return ()


def _settings_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What a run may have chosen otherwise than the file that it started from says."""
    bias = tensors.get("classifier/out/bias")
    return {
        "classes": 0 if bias is None else bias.shape[0],
        "pooling": "cls" if "classifier/dense/kernel" in tensors else "mean",
        "tied": "lm_head/kernel" not in tensors,
    }
