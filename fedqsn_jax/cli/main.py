"""The main job: ``python -m fedqsn_jax.main --config=configs/digits.py --workdir=DIR``."""

import argparse
import functools
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedqsn_jax.host import signals

if TYPE_CHECKING:
    from fedqsn_jax.config.schema import Config
    from fedqsn_jax.host import distributed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: What follows the program's name; by default the process's own.

    Returns:
      The exit code: 0; `signals.REFUSED` or `signals.INTERRUPTED`, told in one line; of several
      processes 1 where another one is gone.
    """
    return signals.answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    # Imports stand here so that a Ctrl-C during them, seconds long, is no traceback.
    from fedqsn_jax.config.command_line import Parser, chosen_fields, read_config
    from fedqsn_jax.config.fields import describe
    from fedqsn_jax.config.schema import Config, ConfigError
    from fedqsn_jax.core.errors import UserError
    from fedqsn_jax.host import distributed
    from fedqsn_jax.runs.reference import check_reference
    from fedqsn_jax.runs.working_directory import WorkDirectory

    parser = Parser(
        "Federated learning in which the model is the secret.",
        "fields, as --config.FIELD=VALUE, with their defaults:\n"
        + "\n".join(
            f"  {name} = {field.default!r}\n      {field.told()}"
            for name, field in describe(Config).items()
        ),
    )
    parser.add_argument("--config", help="a file under configs/, as FILE or FILE:ALGORITHM")
    parser.add_argument("--workdir", help="the directory of the run; it is made private")
    parser.add_argument(
        "--reference",
        metavar="DIR",
        help="a finished run of FedAvg on the same data, for the kept benefit U",
    )
    parser.add_argument(
        "--compilation_cache",
        metavar="DIR",
        help="keep compiled programs here, for later runs; as JAX_COMPILATION_CACHE_DIR does",
    )
    parser.add_argument("--dry_run", action="store_true", help="show what would run, and stop")
    parser.add_argument(
        "--coordinator_address", help="HOST:PORT of process 0, for a run of several"
    )
    parser.add_argument("--num_processes", help="the number of processes of the run")
    parser.add_argument("--process_id", help="which of them this is, from 0 on")
    try:
        options, overrides = parser.parse_known_args(arguments)
        config = read_config(options.config, overrides)
        if not options.workdir and not options.dry_run:
            raise ConfigError("no --workdir: name the directory of the run")
        several = distributed.read_settings(vars(options))
        if options.workdir:
            work = WorkDirectory(Path(options.workdir))
            if not several:
                # A run looks again; by then JAX and the data have taken their seconds.
                (work.check_fit if options.dry_run else work.check)(config)
            if not options.dry_run:
                signals.remaining_after_interruption(work.what_remains)
        if options.reference and not several:
            check_reference(Path(options.reference), config)
        if several:
            _run_among(several, config, chosen_fields(overrides), options)
    except UserError as error:
        return signals.refuse(error)
    return _run(config, chosen_fields(overrides), options)


def _run(
    config: "Config",
    chosen: Sequence[str],
    options: argparse.Namespace,
    leave: Callable[[], None] = lambda: None,
    suspect: Callable[[BaseException], None] = lambda error: None,
) -> int:
    """Runs.

    Args:
      config: The configuration.
      chosen: The fields of it that the command line sets.
      options: The command line's other options.
      leave: Is called at an end that all processes come to.
      suspect: Is called with an error that a process that is gone may have caused, before it is
        told.
    """
    # Only now, so that mistakes are answered without waiting for JAX.
    from fedqsn_jax.core.errors import UserError
    from fedqsn_jax.host import distributed
    from fedqsn_jax.host.checkpoints import CheckpointError
    from fedqsn_jax.host.devices import computing, keep_compiled_programs
    from fedqsn_jax.reporting.display import Display, silent_display
    from fedqsn_jax.runs import experiment

    directory = Path(options.workdir) if options.workdir else None
    try:
        if options.compilation_cache:
            keep_compiled_programs(options.compilation_cache)
        with computing():
            display = Display() if distributed.is_leader() else silent_display()
            if options.dry_run or directory is None:
                experiment.dry_run(config, directory, display, chosen)
            else:
                reference = Path(options.reference) if options.reference else None
                experiment.run(config, directory, display, chosen, reference)
    except UserError as error:
        leave()
        return signals.refuse(error)
    except CheckpointError as error:
        if error.__cause__ is not None:
            suspect(error.__cause__)
        return signals.refuse(error)
    leave()
    return 0


def _run_among(
    several: "distributed.Settings",
    config: "Config",
    chosen: Sequence[str],
    options: argparse.Namespace,
) -> NoReturn:
    """Runs as one of several distributed, and ends this one.

    Raises:
      ConfigError: The processes do not come together.
    """
    from fedqsn_jax.host import distributed
    from fedqsn_jax.host.lifeline import SILENCE_SECONDS

    lifeline = distributed.connect(several, config)

    def suspect(error: BaseException) -> None:
        # Where a process is gone, a collective operation of the others fails, in a round or while
        # a checkpoint is written. Of that the lifeline tells, and ends this process meanwhile.
        if not isinstance(error, OSError):
            time.sleep(SILENCE_SECONDS + 5)

    try:
        code = _run(
            config, chosen, options, functools.partial(distributed.leave, lifeline), suspect
        )
    except Exception as error:
        import jax

        if isinstance(error, jax.errors.JaxRuntimeError):
            suspect(error)
        traceback.print_exc()
        code = 1
    # Before it lets go JAX would wait for the others, who learn of it from the closed lifeline; or
    # ask process 0, which is gone, until Python has shut down.
    signals.leave(code)
