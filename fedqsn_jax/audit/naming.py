"""Names who leaked a model: ``python -m fedqsn_jax.audit trace --workdir=DIR --model=LEAKED``."""

from pathlib import Path
from typing import Any

from fedqsn_jax.audit.case import case_of_run, read_model
from fedqsn_jax.audit.leak_tracing import as_json, trace
from fedqsn_jax.audit.running import FOLDER
from fedqsn_jax.host.devices import computing
from fedqsn_jax.reporting.display import Display
from fedqsn_jax.reporting.writers import write_json
from fedqsn_jax.runs.claims import claim_directory

_SHOWN = 10


@computing()
def trace_directory(
    workdir: Path, model: Path, display: Display, false_alarm: float = 1e-3
) -> dict[str, Any]:
    """Compares a leaked model with the copies that a finished run's clients were sent.

    Args:
      workdir: The run's directory, in which ``audit/trace.json`` is written.
      model: The directory of the leaked model: a run's, an exported one's or a language model's.
      display: Where progress and the answer are shown.
      false_alarm: The largest probability of a false alarm at which a client is named.

    Returns:
      What is in trace.json.

    Raises:
      ConfigError: There is no finished run that can be traced, or no model of its architecture.
      CheckpointError: A checkpoint cannot be read.
    """
    case = case_of_run(workdir)
    leaked = read_model(model, case, "--model")
    with claim_directory(workdir):
        with display.steps("replaying rounds", case.config.rounds) as steps:
            (suspects,) = trace(case, [leaked], lambda: steps.add(1))
        report = as_json(suspects, false_alarm)
        (workdir / FOLDER).mkdir(mode=0o700, exist_ok=True)
        write_json(workdir / FOLDER / "trace.json", report)
    show(report, display)
    display.message(f"written to {workdir / FOLDER / 'trace.json'}; only you may read it")
    return report


def show(report: dict[str, Any], display: Display) -> None:
    """Prints the clients that agree best with the leaked model, and who is named."""
    suspects = report["suspects"][:_SHOWN]
    display.message("")
    display.message(f"{'client':>10} {'score':>8} {'false alarm':>12}")
    for each in suspects:
        mark = " *" if each["client"] in report["named"] else ""
        alarm = f"{each['false_alarm']:.1e}" if each["false_alarm"] < 1 else "1"
        display.message(f"{each['client']:>10} {each['score']:>8.1f} {alarm:>12}{mark}")
    display.message("")
    display.message(conclusion(report))


def conclusion(report: dict[str, Any]) -> str:
    """The answer in a sentence."""
    allowed, named = report["false_alarm_allowed"], report["named"]
    if not named:
        return (
            f"nobody is named: no client's copies agree with the leaked model beyond what happens "
            f"by chance with probability {allowed:g}"
        )
    clients = ", ".join(map(str, named))
    who = f"client {clients}" if len(named) == 1 else f"clients {clients}"
    return (
        f"the leaked model was made of what {who} received; that a client without a part in it is "
        f"named has a probability of at most {allowed:g}"
    )
