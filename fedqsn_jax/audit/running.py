"""An audit from start to finish: of a run's directory, or of a model of one's own."""

import shutil
from pathlib import Path
from typing import Any

from fedqsn_jax.audit.adversaries import check_colluders
from fedqsn_jax.audit.case import (
    OwnModel,
    case_of_model,
    case_of_run,
    read_model,
    read_reference,
    require_same_architecture,
)
from fedqsn_jax.audit.playing import RECEIVED, play
from fedqsn_jax.audit.report import make_report, show, write
from fedqsn_jax.audit.scene import AuditSettings
from fedqsn_jax.core.types import Params
from fedqsn_jax.host.devices import computing
from fedqsn_jax.reporting.display import Display, silent_display
from fedqsn_jax.runs.claims import claim_directory

FOLDER = "audit"
"""Where an audit writes, in the run's directory."""


@computing()
def audit_directory(
    workdir: Path,
    settings: AuditSettings,
    display: Display,
    *,
    public_base: Path | None = None,
    reference: Path | None = None,
    replay: bool = False,
) -> dict[str, Any]:
    """Audits a finished run and writes the report into its directory.

    Args:
      workdir: The run's directory.
      settings: How thorough the audit is.
      display: Where progress and the report are shown.
      public_base: A public model of the same architecture.
      reference: The directory of a FedAvg run on the same data.
      replay: Whether what clients were sent is made again although it is there.

    Returns:
      What is in audit.json.

    Raises:
      ConfigError: There is no finished run, its data are gone or others, or the options do not fit
        it. Nothing was written then.
      CheckpointError: A checkpoint cannot be read.
    """
    case = case_of_run(workdir)
    check_colluders(settings.colluders, case.data.clients)
    base = read_model(public_base, case, "--public_base") if public_base else None
    fedavg = read_reference(reference, case) if reference else None
    named = [str(path.resolve()) if path else "" for path in (public_base, reference)]
    with claim_directory(workdir):
        directory = workdir / FOLDER
        if replay:
            shutil.rmtree(directory / RECEIVED, ignore_errors=True)
        results = play(case, settings, directory, display, base, fedavg, named)
        report = make_report(case, settings, results)
        write(report, directory)
    show(report, display)
    display.message(f"written to {directory}; only you may read it")
    return report


@computing()
def audit_run(
    result: Any,
    own: OwnModel,
    directory: Path | str,
    settings: AuditSettings | None = None,
    *,
    public_base: Params | None = None,
    reference: Params | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Audits a model of your own, after `api.own_model.federate`.

    Example::

      result = federate((apply_fn, params), clients, test, rounds=20)
      report = audit_run(result, OwnModel(apply_fn, params, clients, test), "audits/mine")
      report["adversaries"]["1"]["protected_share"]["value"]

    Args:
      result: What `federate` returned: its ``simulation`` and ``state`` are read.
      own: The model and the rows that `federate` had.
      directory: Where the audit writes; it is made private.
      settings: How thorough the audit is.
      public_base: Parameters of a public model of the same architecture.
      reference: Parameters that FedAvg reached on the same rows.
      display: Where progress and the report are shown; None: nowhere.

    Returns:
      What is in audit.json.

    Raises:
      ConfigError: The settings do not fit the run.
      ValueError: The arrays of clients do not agree.
    """
    settings, display = settings or AuditSettings(), display or silent_display()
    case = case_of_model(result.simulation, result.state, own)
    check_colluders(settings.colluders, case.data.clients)
    for name, params in (("public_base", public_base), ("reference", reference)):
        if params is not None:
            require_same_architecture(params, case, name)
    with claim_directory(Path(directory)):
        results = play(case, settings, Path(directory), display, public_base, reference)
        report = make_report(case, settings, results)
        write(report, Path(directory))
    show(report, display)
    return report
