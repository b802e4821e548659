"""A finished run of FedAvg, against which another run's benefit is measured."""

import json
from pathlib import Path
from typing import Any

from fedqsn_jax.config.schema import Config, ConfigError, flatten
from fedqsn_jax.reporting.summary import number
from fedqsn_jax.runs.working_directory import WorkDirectory

_SAME = ("seed", "rounds", "data.", "model.", "pretraining.")
"""What has to be as in the run: the same rows, the same start, as long a training."""

_FREE = ("data.resident",)
"""Fields of these that change no figure."""


def check_reference(directory: Path, config: Config) -> None:
    """Makes sure that a directory holds a run that another can be measured against.

    Args:
      directory: Where the run of FedAvg is.
      config: The settings of the run that is measured.

    Raises:
      ConfigError: There is no finished run, it is not of FedAvg, or of other data, another model,
        seed or number of rounds.
    """
    work, where = _opened(directory)
    theirs = work.config()
    if theirs.algorithm != "fedavg":
        raise ConfigError(f"{where}: algorithm = {theirs.algorithm!r}; allowed is fedavg")
    _require_whole(theirs, where)
    ours, others = flatten(config), flatten(theirs)
    for name, value in ours.items():
        if name.startswith(_SAME) and name not in _FREE and others[name] != value:
            raise ConfigError(
                f"{where}: {name} = {others[name]!r}; allowed is that of the run, {value!r}"
            )
    _summary(work, where)


def reference_score(directory: Path, rows: str, score: str) -> float:
    """The score of the hidden model at the end of a run that `check_reference` let pass.

    Args:
      directory: Where the run is.
      rows: The fingerprint of the rows of the run that is measured; see `data.splits`.
      score: The metric's name.

    Raises:
      ConfigError: Its rows were others, or it has no such score.
    """
    work, where = _opened(directory)
    try:
        work.check_rows(rows)
    except ConfigError as error:
        raise ConfigError(f"{where}: its rows are not those of the run") from error
    views = _summary(work, where).get("views", {})
    found = number(views.get("global", {}).get("end", {}).get(score))
    if found is None:
        raise ConfigError(f"{where}: its summary.json has no {score} of the global model")
    return found


def _opened(directory: Path) -> tuple[WorkDirectory, str]:
    work, where = WorkDirectory(directory), f"--reference={directory}"
    if not (work.path / "config.json").is_file():
        raise ConfigError(f"{where}: there is no run in it, no config.json")
    return work, where


def _require_whole(config: Config, where: str) -> None:
    """FedAvg that holds something back is not the whole benefit."""
    broadcast = config.broadcast
    if broadcast.every != 1 or broadcast.share != 1:
        raise ConfigError(
            f"{where}: broadcast.every = {broadcast.every}, broadcast.share = {broadcast.share}; "
            f"allowed is 1 of both"
        )


def _summary(work: WorkDirectory, where: str) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(work.summary.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{where}: the run is not finished, there is no summary.json; the command that began "
            f"it resumes it"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: summary.json cannot be read") from error
    finished, rounds = summary.get("rounds"), work.config().rounds
    if finished != rounds:
        raise ConfigError(
            f"{where}: the run is not finished, its summary is of round {finished} of {rounds}"
        )
    return summary
