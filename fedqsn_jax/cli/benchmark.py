"""Seconds of a round on the workloads with which simulators are compared.

  python -m fedqsn_jax.benchmark

measures both workloads of `fedqsn_jax.workloads` (100 clients a round, a CNN and a dense network)
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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqsn_jax.host import signals

if TYPE_CHECKING:
    from rich.table import Table

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
    import jax

    from fedqsn_jax.benchmarks import measuring
    from fedqsn_jax.benchmarks.workloads import MODELS, make_population
    from fedqsn_jax.core.errors import UserError

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", action="append", choices=list(MODELS), help="default: all")
    parser.add_argument("--calls", type=int, default=10, help="measured calls of each algorithm")
    parser.add_argument("--rounds_per_call", type=int, default=10)
    parser.add_argument(
        "--chunk_size", type=int, default=0, help="clients at once; 0: what the package chooses"
    )
    parser.add_argument("--clients", type=_sizes, help="sizes of rounds, for example 1000,10000")
    parser.add_argument("--population", type=int, help="number of clients to draw rounds from")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of --population")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--profile", type=Path, help="a directory for JAX profiler traces")
    options = parser.parse_args(arguments)
    facts: dict[str, Any] = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "chunk_size": options.chunk_size,
        "workloads": {},
    }
    calls, per_call, profile = options.calls, options.rounds_per_call, options.profile
    try:
        if options.clients:
            facts["cohorts"] = measuring.measure_cohorts(options.clients, calls, profile)
        if options.population:
            facts["population"] = measuring.measure_population(
                options.population, options.rounds, per_call, profile
            )
        if not (options.clients or options.population):
            data = make_population()
            for workload in options.workload or MODELS:
                result = measuring.measure(
                    workload, data, calls, per_call, options.chunk_size, profile
                )
                result["parts"] = measuring.measure_parts(workload, data, calls)
                facts["workloads"][workload] = result
    except UserError as error:
        return signals.refuse(error)
    _show(facts)
    if options.out:
        options.out.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("allowed are numbers of 1 or more")
    return sizes


def _show(facts: dict[str, Any]) -> None:
    from fedqsn_jax.host.console import EnduringConsole

    console, title = EnduringConsole(), f"JAX {facts['jax']}, {facts['device']}"
    measured = [*facts.get("cohorts", {}).values(), facts.get("population", {})]
    for workload in facts["workloads"].values():
        measured += workload["algorithms"].values()
    busy = any("device_share" in times for times in measured)
    columns = (*_TIMES, "device busy") if busy else _TIMES
    if facts["workloads"]:
        table = _table("workload", "algorithm", *columns, "over FedAvg", title=title)
        parts = _table("workload", "part", *_TIMES, title="FedQSN's parts, apart")
        for workload, result in facts["workloads"].items():
            for name, times in result["algorithms"].items():
                ratio = f"{result['fedqsn_over_fedavg']:.3f}" if name == "fedqsn" else ""
                table.add_row(workload, name, *_cells(times), ratio)
            for name, times in result["parts"].items():
                parts.add_row(workload, name, *_cells(times))
        console.print(table)
        console.print(parts)
    if "cohorts" in facts:
        table = _table("clients a round", *columns, "peak memory, MB", title=title)
        for size, result in facts["cohorts"].items():
            peak = result.get("peak_bytes_in_use")
            table.add_row(size, *_cells(result), f"{peak / 1e6:.0f}" if peak else "")
        console.print(table)
        for size, result in facts["cohorts"].items():
            console.print(f"{size}: {result['clients']}")
    if "population" in facts:
        result = facts["population"]
        table = _table("rounds", *columns, "in calls", "programs", title=title)
        table.add_row(
            str(result["rounds"]),
            *_cells(result),
            f"{result['in_calls']:.1%}",
            str(result["programs"]),
        )
        console.print(table)
        console.print(result["clients"])


def _table(*columns: str, title: str) -> "Table":
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _cells(times: dict[str, Any]) -> tuple[str, ...]:
    low, high = times["quartiles"]
    share = (f"{times['device_share']:.1%}",) if "device_share" in times else ()
    return (
        f"{1000 * times['median']:.2f}",
        f"{1000 * low:.2f}-{1000 * high:.2f}",
        f"{1000 * times['best']:.2f}",
        *share,
    )
