"""An audit from start to finish: of a run's directory, or of a model of one's own."""

import shutil
from pathlib import Path
from typing import Any

from fedqsn_jax.audit.adversaries import check_colluders
from fedqsn_jax.audit.case import case_of_run, read_base, read_reference
from fedqsn_jax.audit.playing import play
from fedqsn_jax.audit.report import make_report, show, write
from fedqsn_jax.audit.scene import Settings
from fedqsn_jax.reporting.display import Display
from fedqsn_jax.runs.working_directory import claim_directory

FOLDER = "audit"
"""Where an audit writes, in the run's directory."""


def audit_directory(
    workdir: Path,
    settings: Settings,
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
    base = read_base(public_base, case) if public_base else None
    fedavg = read_reference(reference, case) if reference else None
    named = [str(path.resolve()) if path else "" for path in (public_base, reference)]
    with claim_directory(workdir):
        directory = workdir / FOLDER
        if replay:
            shutil.rmtree(directory / "received", ignore_errors=True)
        results = play(case, settings, directory, display, base, fedavg, named)
        report = make_report(case, settings, results)
        write(report, directory)
    show(report, display)
    display.message(f"written to {directory}; only you may read it")
    return report
