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
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from fedqsn_jax.config import ConfigError
from fedqsn_jax.data.federated import ClientData
from fedqsn_jax.device_time import traced
from fedqsn_jax.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.randomness import client_round_key
from fedqsn_jax.running import initial_state, place
from fedqsn_jax.simulation import Simulation
from fedqsn_jax.types import Batch, Params
from fedqsn_jax.workloads import (
    MODELS,
    make_endless_population,
    make_population,
    make_workload,
    workload_config,
)

ALGORITHMS = ("fedavg", "fedqsn")
COHORT = 1000
"""Clients a round of the large population."""
_TRACED_CALLS = 2
_TIMES = ("ms a round", "quartiles", "best")


def timed_calls(
    simulation: Simulation, params: Params, data: ClientData, rows: Batch
) -> Iterator[float]:
    """Runs call after call and yields the seconds of a round; the first call compiles.

    Args:
      simulation: What to run; its configured number of rounds is not obeyed.
      params: The parameters to start from.
      data: The clients' rows.
      rows: Held-out rows, for rounds that are evaluated.
    """
    per_call = simulation.config.rounds_per_call
    state = initial_state(simulation, params)
    last = jax.device_put(np.int32(2**31 - 1))
    data, rows, last = place(simulation, (data, rows, last))
    for stop in itertools.count(per_call, per_call):
        until = place(simulation, jax.device_put(np.int32(stop)))
        began = time.perf_counter()
        state, result = simulation.run(state, data, rows, until, last)
        jax.block_until_ready((state, result))
        yield (time.perf_counter() - began) / per_call


def measure(
    model: str,
    data: ClientData,
    calls: int,
    rounds_per_call: int,
    chunk_size: int,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Measures one workload, algorithms in turn; seconds of a round, JSON-able."""
    running, choices = {}, {}
    for name in ALGORITHMS:
        config = workload_config(name, data.clients, data.clients, rounds_per_call, chunk_size)
        simulation, params, rows = make_workload(model, config, data)
        running[name] = timed_calls(simulation, params, data, rows)
        choices[name] = simulation.choice.reason
    compiling = {name: next(each) * rounds_per_call for name, each in running.items()}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(calls):
        for name, each in running.items():
            times[name].append(next(each))
    facts = {
        name: _spread(values)
        | {"first_call": compiling[name], "clients": choices[name]}
        | _device_share(running[name], rounds_per_call, values, profile, f"{model}-{name}")
        for name, values in times.items()
    }
    ratios = [ours / base for ours, base in zip(times["fedqsn"], times["fedavg"], strict=True)]
    return {"algorithms": facts, "fedqsn_over_fedavg": statistics.median(ratios)}


def measure_parts(model: str, data: ClientData, calls: int) -> dict[str, Any]:
    """Seconds of what FedQSN adds to a round, each part as a program of its own; JSON-able."""
    config = workload_config("fedqsn", data.clients, data.clients, 1)
    simulation, params, _ = make_workload(model, config, data)
    sites, transform = simulation.sites, simulation.algorithm.transform
    state = initial_state(simulation, params)
    ids = jnp.arange(data.clients, dtype=jnp.int32)

    @jax.jit
    def quantized() -> Any:
        whole = whole_proxy(state.params, sites)
        return dequantize_proxy(transform.prepare(state.transform_state, whole))

    prepared = quantized()

    @jax.jit
    def masks() -> Any:
        def one(client_id: jax.Array) -> Any:
            key = client_round_key(state.secret_key, state.round, client_id)
            return transform.apply(key, state.transform_state, prepared).visible

        return jax.vmap(one)(ids)

    visible, aggregator = masks(), simulation.aggregator
    weight = aggregator.weigh(data.rows(ids)).sum()

    @jax.jit
    def aggregated() -> Any:
        seen = jax.tree.map(lambda mask: mask.any(axis=0), visible)
        total = aggregator.contribute(prepared.params, weight, seen)
        return aggregator.finish(params, state.optimizer_state, total, prepared.visible)

    parts = {"quantize": quantized, "mask": masks, "aggregate": aggregated}
    return {name: _spread(_repeated(part, calls)) for name, part in parts.items()}


def measure_cohorts(
    sizes: Sequence[int], calls: int, profile: Path | None = None
) -> dict[str, Any]:
    """Seconds and memory of rounds of so many clients, dense network, ascending; JSON-able."""
    facts = {}
    for size in sorted(sizes):
        data = make_endless_population(size)
        simulation, params, rows = make_workload(
            "dense", workload_config("fedqsn", size, size, 1), data
        )
        running = timed_calls(simulation, params, data, rows)
        next(running)
        times = [next(running) for _ in range(calls)]
        facts[str(size)] = _spread(times) | _memory() | {"clients": simulation.choice.reason}
        facts[str(size)] |= _device_share(running, 1, times, profile, f"clients-{size}")
    return facts


def measure_population(
    population: int, rounds: int, rounds_per_call: int, profile: Path | None = None
) -> dict[str, Any]:
    """Many rounds out of a large population: seconds, memory, compilations; JSON-able."""
    data = make_endless_population(population)
    cohort = min(COHORT, population)
    config = workload_config("fedqsn", cohort, population, rounds_per_call)
    simulation, params, rows = make_workload("dense", config, data)
    running = timed_calls(simulation, params, data, rows)
    next(running)
    before, began = _memory(), time.perf_counter()
    times = [next(running) for _ in range(-(-rounds // rounds_per_call))]
    seconds = time.perf_counter() - began
    facts = _spread(times) | {
        "rounds": len(times) * rounds_per_call,
        "seconds": seconds,
        "in_calls": sum(times) * rounds_per_call / seconds,
        "programs": simulation.run._cache_size(),  # type: ignore[attr-defined]
        "memory_before": before,
        "memory_after": _memory(),
        "clients": simulation.choice.reason,
    }
    return facts | _device_share(running, rounds_per_call, times, profile, "population")


def _device_share(
    running: Iterator[float],
    rounds_per_call: int,
    times: Sequence[float],
    profile: Path | None,
    name: str,
) -> dict[str, float]:
    """Traces some more calls; says how long devices were busy, where their kind's trace tells.

    Args:
      running: The calls; see `timed_calls`.
      rounds_per_call: Rounds of one.
      times: Seconds of a round, measured without tracing.
      profile: The directory for traces; None: there are none, and nothing is said.
      name: That of the trace in it.

    Returns:
      Seconds of a round in which a device was busy, the mean over devices; and their share.
    """
    if profile is None:
        return {}
    with traced(profile / name) as busy:
        for _ in range(_TRACED_CALLS):
            next(running)
    if not busy:
        return {}
    seconds = statistics.mean(busy) / (_TRACED_CALLS * rounds_per_call)
    return {"device_busy": seconds, "device_share": seconds / statistics.median(times)}


def _repeated(function: Callable[[], Any], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return times


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]
    )
    return {"median": median, "quartiles": [low, high], "best": min(values)}


def _memory() -> dict[str, int]:
    """Bytes in use and the most so far, where the device tells."""
    stats = jax.devices()[0].memory_stats() or {}
    return {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use") if name in stats}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 after a mistake of the user's."""
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
            facts["cohorts"] = measure_cohorts(options.clients, calls, profile)
        if options.population:
            facts["population"] = measure_population(
                options.population, options.rounds, per_call, profile
            )
        if not (options.clients or options.population):
            data = make_population()
            for workload in options.workload or MODELS:
                result = measure(workload, data, calls, per_call, options.chunk_size, profile)
                result["parts"] = measure_parts(workload, data, calls)
                facts["workloads"][workload] = result
    except ConfigError as error:
        print(f"fedqsn_jax: {error}", file=sys.stderr)
        return 2
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
    console, title = Console(), f"JAX {facts['jax']}, {facts['device']}"
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


def _table(*columns: str, title: str) -> Table:
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


if __name__ == "__main__":
    sys.exit(main())
