"""Seconds of a round on the workloads with which simulators are compared.

  python -m fedqsn_jax.benchmark

measures both workloads of `benchmarks.workloads` (100 clients a round, a CNN and a dense network)
on whatever device is there. FedAvg and FedQSN (p1 = p2 = 0.2, 4 bits) alternate, so that a drifting
machine meets both. A second table says what FedQSN adds to a round, part by part.

  python -m fedqsn_jax.benchmark --clients=1000,10000,100000

measures rounds of so many clients, with the dense network and examples that are made on the device.

  python -m fedqsn_jax.benchmark --population=1000000 --rounds=1000

runs so many rounds of 1,000 clients out of such a population.

With ``--profile=DIR`` JAX's profiler traces a few more calls of each, after the measured ones. The
traces are kept there, and from them comes the share of a round's time in which the device was busy:
the time that is covered on a GPU's streams, by the median time of a round without tracing, which
slows the host.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqsn_jax.host import signals

if TYPE_CHECKING:
    from fedqsn_jax.reporting.display import Display

_TIMES = ("ms a round", "quartiles", "best")


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
    from fedqsn_jax.benchmarks.workloads import MODELS
    from fedqsn_jax.config.command_line import Parser
    from fedqsn_jax.config.paths import user_path
    from fedqsn_jax.core.errors import UserError
    from fedqsn_jax.host.atomic_files import told_as_file_error
    from fedqsn_jax.host.devices import computing
    from fedqsn_jax.reporting.display import Display

    parser = Parser(__doc__ or "")
    parser.add_argument("--workload", action="append", choices=list(MODELS), help="default: all")
    parser.add_argument(
        "--calls", type=_positive, default=10, help="measured calls of each algorithm"
    )
    parser.add_argument("--rounds_per_call", type=_positive, default=10)
    parser.add_argument(
        "--chunk_size", type=_count, default=0, help="clients at once; 0: what the package chooses"
    )
    parser.add_argument("--clients", type=_sizes, help="sizes of rounds, for example 1000,10000")
    parser.add_argument(
        "--population", type=_positive, help="number of clients to draw rounds from"
    )
    parser.add_argument("--rounds", type=_positive, default=100, help="rounds of --population")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--profile", type=Path, help="a directory for JAX profiler traces")
    try:
        options = parser.parse_args(arguments)
        if options.out:
            # What cannot be written is told before it is measured.
            with told_as_file_error(options.out):
                user_path(options.out).parent.mkdir(parents=True, exist_ok=True)
                user_path(options.out).open("a").close()
        with computing():
            display = Display()
            facts = _measure(options, display)
    except UserError as error:
        return signals.refuse(error)
    code = 0
    # Results first: what is shown may go nowhere.
    if options.out:
        try:
            with told_as_file_error(options.out):
                user_path(options.out).write_text(json.dumps(facts, indent=2) + "\n")
        except UserError as error:
            code = signals.refuse(error)
    _show(facts, display)
    return code


def _measure(options: argparse.Namespace, display: "Display") -> dict[str, Any]:
    """What the options ask for, as it stands in the file of ``--out``."""
    import jax

    from fedqsn_jax.benchmarks import measuring
    from fedqsn_jax.benchmarks.workloads import MODELS, make_population
    from fedqsn_jax.config.paths import user_path

    facts: dict[str, Any] = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "chunk_size": options.chunk_size,
        "workloads": {},
    }
    calls, per_call = options.calls, options.rounds_per_call
    profile = options.profile and user_path(options.profile)
    if options.clients:
        with display.waiting("measuring rounds of many clients"):
            facts["cohorts"] = measuring.measure_cohorts(options.clients, calls, profile)
    if options.population:
        with display.waiting("measuring rounds out of a large population"):
            facts["population"] = measuring.measure_population(
                options.population, options.rounds, per_call, profile
            )
    if options.clients or options.population:
        return facts
    with display.waiting("making the population"):
        data = make_population()
    for workload in options.workload or MODELS:
        with display.waiting(f"measuring {workload}"):
            result = measuring.measure(workload, data, calls, per_call, options.chunk_size, profile)
        with display.waiting(f"measuring the parts of {workload}"):
            result["parts"] = measuring.measure_parts(workload, data, calls)
        facts["workloads"][workload] = result
    return facts


def _sizes(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _positive(text: str) -> int:
    return _count(text, least=1)


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or len(text) > 10 or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: allowed are whole numbers of {least} or more")
    return int(text)


def _show(facts: dict[str, Any], display: "Display") -> None:
    display.message(f"JAX {facts['jax']}, {facts['device']}")
    results = {
        (workload, name): times | {"over FedAvg": ""}
        for workload, result in facts["workloads"].items()
        for name, times in result["algorithms"].items()
    }
    for workload, result in facts["workloads"].items():
        ratio = f"{result['fedqsn_over_fedavg']:.3f}"
        results[workload, "fedqsn"]["over FedAvg"] = ratio
    _table(display, "workload, algorithm", results, ["over FedAvg"])
    parts = {
        (workload, name): times
        for workload, result in facts["workloads"].items()
        for name, times in result["parts"].items()
    }
    _table(display, "FedQSN's parts, apart", parts)
    cohorts = {}
    for size, result in facts.get("cohorts", {}).items():
        peak = result.get("peak_bytes_in_use")
        memory = f"{peak / 1e6:.0f}" if peak else "-"
        cohorts[(size,)] = result | {"peak memory, MB": memory}
    _table(display, "clients a round", cohorts, ["peak memory, MB"])
    for (size,), result in cohorts.items():
        display.message(f"{size}: {result['clients']}")
    if "population" in facts:
        result = facts["population"]
        more = {"in calls": f"{result['in_calls']:.1%}", "programs": str(result["programs"])}
        _table(display, "rounds", {(str(result["rounds"]),): result | more}, list(more))
        display.message(result["clients"])


def _table(
    display: "Display",
    title: str,
    results: Mapping[Any, dict[str, Any]],
    more: Sequence[str] = (),
) -> None:
    """Prints the times of what was measured, by its name, and columns that are texts already."""
    from fedqsn_jax.reporting.tables import Column

    if not results:
        return
    busy = any("device_share" in times for times in results.values())
    heads = [*_TIMES, *["device busy"] * busy]
    rows = [_cells(times) for times in results.values()]
    columns = [Column(head, [row[index] for row in rows]) for index, head in enumerate(heads)]
    columns += [Column(head, [times[head] for times in results.values()]) for head in more]
    display.message("")
    display.table(title, Column("", [", ".join(name) for name in results], right=False), columns)


def _cells(times: dict[str, Any]) -> tuple[str, ...]:
    low, high = times["quartiles"]
    return (
        f"{1000 * times['median']:.2f}",
        f"{1000 * low:.2f}-{1000 * high:.2f}",
        f"{1000 * times['best']:.2f}",
        f"{times['device_share']:.1%}" if "device_share" in times else "-",
    )
