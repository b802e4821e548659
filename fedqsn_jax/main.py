"""The main job: ``python -m fedqsn_jax.main --config=configs/digits.py --workdir=DIR``."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after a second Ctrl-C, by the shell's convention."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: What follows the program's name; by default the process's own.

    Returns:
      The exit code: 0; 2 after a mistake of the user's, which is told in one line; `INTERRUPTED`.
    """
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _main(arguments: Sequence[str] | None) -> int:
    # Imports stand here so that a Ctrl-C during them, seconds long, is no traceback.
    from fedqsn_jax.command_line import Parser, read_config
    from fedqsn_jax.config import Config, ConfigError, flatten

    parser = Parser(
        "Federated learning in which the model is the secret.",
        "fields, as --config.FIELD=VALUE, with their defaults:\n"
        + "\n".join(f"  {name} = {value!r}" for name, value in flatten(Config()).items()),
    )
    parser.add_argument("--config", help="a file under configs/, as FILE or FILE:ALGORITHM")
    parser.add_argument("--workdir", help="the directory of the run; it is made private")
    parser.add_argument(
        "--compilation_cache",
        metavar="DIR",
        help="keep compiled programs here, for later runs; as JAX_COMPILATION_CACHE_DIR does",
    )
    parser.add_argument("--dry_run", action="store_true", help="show what would run, and stop")
    try:
        options, overrides = parser.parse_known_args(arguments)
        config = read_config(options.config, overrides)
        if not options.workdir and not options.dry_run:
            raise ConfigError("no --workdir: name the directory of the run")
    except ConfigError as error:
        return _refuse(error)
    # Only now, so that mistakes are answered without waiting for JAX.
    from fedqsn_jax import experiment
    from fedqsn_jax.checkpoint import CheckpointError
    from fedqsn_jax.reporting.display import Display

    directory = Path(options.workdir) if options.workdir else None
    if options.compilation_cache:
        experiment.keep_compiled_programs(options.compilation_cache)
    try:
        if options.dry_run or directory is None:
            experiment.dry_run(config, directory, Display())
        else:
            experiment.run(config, directory, Display())
    except (ConfigError, CheckpointError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("fedqsn_jax: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


def _refuse(error: Exception) -> int:
    print(f"fedqsn_jax: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
