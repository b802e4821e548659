"""The command's body; see `main`."""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedqsn_jax.host import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: What follows the program's name; by default the process's own.

    Returns:
      The exit code: 0; `signals.REFUSED` or `signals.INTERRUPTED`, told in one line.
    """
    return signals.answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    return _trace(given[1:]) if given[:1] == ["trace"] else _play(given)


def _play(arguments: Sequence[str]) -> int:
    # Imports stand here, and below, so that a Ctrl-C during them is no traceback.
    from fedqsn_jax.config.command_line import Parser
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.core.errors import UserError
    from fedqsn_jax.runs.working_directory import WorkDirectory

    parser = Parser(
        "Plays the thief: what colluding clients get from the model of a finished run.",
        "writes audit.json, audit.png and audit.html to DIR/audit; an audit that was interrupted\n"
        "goes on where it was; `trace` instead of options names who leaked a model",
    )
    parser.add_argument("--workdir", metavar="DIR", help="the directory of the finished run")
    parser.add_argument(
        "--colluders",
        default="1,3,half",
        help="numbers of colluding clients, half for half of all; by default 1,3,half",
    )
    parser.add_argument(
        "--queries",
        default="50,500,10000",
        help="numbers of questions to the owner's model; by default 50,500,10000",
    )
    parser.add_argument("--steps", default="0", help="steps of each training; 0: by the rows")
    parser.add_argument(
        "--public_base",
        metavar="DIR",
        help="a public model of the same architecture: a run, or a pre-trained language model",
    )
    parser.add_argument("--reference", metavar="DIR", help="a FedAvg run on the same data, for U")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="run the rounds again even if what clients were sent is there",
    )
    try:
        options = parser.parse_args(arguments)
        if not options.workdir:
            raise ConfigError("no --workdir: name the directory of a finished run")
        workdir = Path(options.workdir)
        # Before JAX is waited for.
        work = WorkDirectory(workdir)
        work.check(work.config())
        colluders = numbers("--colluders", options.colluders, words=("half",))
        queries = numbers("--queries", options.queries)
        (steps,) = numbers("--steps", options.steps, low=0)[:1]
        return _audit(workdir, options, colluders, queries, steps)
    except UserError as error:
        return signals.refuse(error)


def _trace(arguments: Sequence[str]) -> int:
    from fedqsn_jax.audit.words import NOT_TRACED
    from fedqsn_jax.config.command_line import Parser
    from fedqsn_jax.config.schema import ConfigError
    from fedqsn_jax.core.errors import UserError
    from fedqsn_jax.runs.working_directory import WorkDirectory

    parser = Parser(
        "Names the clients of whose copies a leaked model was made, in a run with tracing_margin.",
        "replays the rounds and writes DIR/audit/trace.json",
    )
    parser.add_argument("--workdir", metavar="DIR", help="the directory of the finished run")
    parser.add_argument(
        "--model", metavar="DIR", help="the leaked model: a run, or an exported or language model"
    )
    parser.add_argument(
        "--false_alarm",
        default="0.001",
        help="the largest probability of naming a client wrongly; by default 0.001",
    )
    try:
        options = parser.parse_args(arguments)
        for name in ("workdir", "model"):
            if not getattr(options, name):
                raise ConfigError(f"no --{name}: name a directory")
        allowed = probability("--false_alarm", options.false_alarm)
        work = WorkDirectory(Path(options.workdir))
        config = work.config()
        work.check(config)
        # Before JAX is waited for.
        if not config.tracing_margin:
            raise ConfigError(f"--workdir={options.workdir}: {NOT_TRACED}")
        return _traced(Path(options.workdir), Path(options.model), allowed)
    except UserError as error:
        return signals.refuse(error)


def _traced(workdir: Path, model: Path, allowed: float) -> int:
    from fedqsn_jax.audit.naming import trace_directory
    from fedqsn_jax.host.checkpoints import CheckpointError
    from fedqsn_jax.reporting.display import Display

    try:
        trace_directory(workdir, model, Display(), allowed)
    except CheckpointError as error:
        return signals.refuse(error)
    return 0


def probability(option: str, text: str) -> float:
    """Reads a probability above 0 and below 1.

    Args:
      option: What the user wrote it after.
      text: What was written.

    Raises:
      ConfigError: It is something else.
    """
    from fedqsn_jax.config.schema import ConfigError

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise ConfigError(f"{option}={text}: allowed is a number above 0 and below 1")
    return value


def _audit(workdir: Path, options: Any, colluders: tuple, queries: tuple, steps: int) -> int:
    from fedqsn_jax.audit.running import audit_directory
    from fedqsn_jax.audit.scene import AuditSettings
    from fedqsn_jax.host.checkpoints import CheckpointError
    from fedqsn_jax.reporting.display import Display

    settings: AuditSettings = AuditSettings(colluders=colluders, queries=queries, steps=steps)
    signals.remaining_after_interruption(lambda: "the same command goes on where it was")
    try:
        audit_directory(
            workdir,
            settings,
            Display(),
            public_base=Path(options.public_base) if options.public_base else None,
            reference=Path(options.reference) if options.reference else None,
            replay=options.replay,
        )
    except CheckpointError as error:
        return signals.refuse(error)
    return 0


def numbers(option: str, text: str, words: tuple[str, ...] = (), low: int = 1) -> tuple:
    """Reads the numbers, or words, in a list that is separated by commas.

    Args:
      option: What the user wrote them after.
      text: The list.
      words: Words that are allowed too.
      low: The smallest number that is allowed.

    Raises:
      ConfigError: Something else is in it, or nothing.
    """
    from fedqsn_jax.config.schema import ConfigError

    found: list[int | str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            value = part if part in words else ast.literal_eval(part)
        except (ValueError, SyntaxError):
            value = None
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= low
        if not (is_number or (isinstance(value, str) and value in words)):
            also = "".join(f", or {word}" for word in words)
            raise ConfigError(f"{option}={text}: allowed are integers of {low} or more{also}")
        found.append(value)  # type: ignore[arg-type]
    if not found:
        raise ConfigError(f"{option}={text}: name one or more")
    return tuple(found)
