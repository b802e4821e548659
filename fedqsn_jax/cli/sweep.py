"""A sweep: ``python -m fedqsn_jax.sweep --config=configs/digits.py --sweep=FILE --workdir=DIR``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedqsn_jax.host import signals

if TYPE_CHECKING:
    from fedqsn_jax.sweeps.audits import PointAudit
    from fedqsn_jax.sweeps.grid import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: What follows the program's name; by default the process's own.

    Returns:
      The exit code: 0; `signals.REFUSED` or `signals.INTERRUPTED`, told in one line.
    """
    return signals.answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    # Imports stand here so that a Ctrl-C during them, seconds long, is no traceback.
    from fedqsn_jax.config.command_line import Parser, chosen_fields, read_config
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.core.errors import UserError

    parser = Parser(
        "Runs a grid of settings over seeds, and draws what they cost and buy.",
        "--config.FIELD=VALUE sets a field for all points, --sweep.FIELD=[VALUE, ...] the values\n"
        "that it takes in every grid; fields are those of fedqsn_jax.main.",
    )
    parser.add_argument("--config", help="a file under configs/, as FILE or FILE:ALGORITHM")
    parser.add_argument("--sweep", help="a file with get_sweep(), such as under configs/sweeps/")
    parser.add_argument("--workdir", help="the directory of the sweep")
    parser.add_argument(
        "--compilation_cache", metavar="DIR", help="keep compiled programs here, for later sweeps"
    )
    parser.add_argument(
        "--at_once",
        metavar="N",
        default="0",
        help="points of a program that are run side by side; 0: what fits and pays",
    )
    parser.add_argument(
        "--audit",
        action="store_true",
        help="audit every finished point; draw the kept benefit against the protected share",
    )
    parser.add_argument(
        "--colluders", help="of audits: numbers of colluding clients, half for half; 1,3,half"
    )
    parser.add_argument("--steps", help="of audits: steps of each training; 0: by the rows")
    parser.add_argument("--dry_run", action="store_true", help="show what would run, and stop")
    try:
        options, rest = parser.parse_known_args(arguments)
        grid_changes = [text for text in rest if text.startswith("--sweep.")]
        overrides = [text for text in rest if not text.startswith("--sweep.")]
        config = read_config(options.config, overrides)
        if not options.workdir and not options.dry_run:
            raise ConfigError("no --workdir: name the directory of the sweep")
        if not options.at_once.isdecimal():
            raise ConfigError(f"--at_once={options.at_once}: allowed is 0 or more")
        for name in ("colluders", "steps"):
            if getattr(options, name) is not None and not options.audit:
                raise ConfigError(f"--{name}: it is of audits; add --audit")
        # Only now, so that mistakes so far are answered without waiting for JAX.
        from fedqsn_jax.sweeps.grid import make_plan, read_grids

        grids = read_grids(options.sweep, grid_changes)
        plan = make_plan(config, grids, chosen_fields(overrides))
        _run(plan, options)
    except UserError as error:
        return signals.refuse(error)
    return 0


def _run(plan: "Plan", options: argparse.Namespace) -> None:
    from fedqsn_jax.host.devices import computing, keep_compiled_programs
    from fedqsn_jax.sweeps import run
    from fedqsn_jax.sweeps.display import SweepDisplay
    from fedqsn_jax.sweeps.results import SweepDirectory

    if options.compilation_cache:
        keep_compiled_programs(options.compilation_cache)
    directory = Path(options.workdir) if options.workdir else None
    with computing():
        display = SweepDisplay()
        audit = _audit(options) if options.audit else None
        if options.dry_run or directory is None:
            plan = plan._replace(audit=audit.described if audit else None)
            groups = run.check(plan, directory, int(options.at_once), audit=audit)
            for line in plan.warnings:
                display.warning(line)
            display.groups([(len(points), reason) for points, reason in groups], plan.repeated)
        else:
            signals.remaining_after_interruption(SweepDirectory(directory).what_remains)
            run.run(plan, directory, display, int(options.at_once), audit)


def _audit(options: argparse.Namespace) -> "PointAudit":
    """The audit of every point: without questions to the model, which no setting answers otherwise.

    The attacks that need none take most of its time already.
    """
    from fedqsn_jax.audit.command import numbers
    from fedqsn_jax.audit.points import PointAuditor
    from fedqsn_jax.audit.scene import AuditSettings

    colluders = numbers("--colluders", options.colluders or "1,3,half", words=("half",))
    (steps,) = numbers("--steps", options.steps or "0", low=0)[:1]
    settings = AuditSettings(colluders=colluders, queries=(), steps=steps, findings=False)
    return PointAuditor(settings)
