"""Seconds of a round: the workloads, their parts, large cohorts; see `fedqsn_jax.benchmark`."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.benchmarks.device_time import traced
from fedqsn_jax.benchmarks.workloads import make_endless_population, make_workload, workload_config
from fedqsn_jax.core.keys import client_round_key
from fedqsn_jax.core.types import Batch, Params
from fedqsn_jax.data.population import ClientData
from fedqsn_jax.protocol.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.simulation.compose import Simulation
from fedqsn_jax.simulation.running import initial_state, place

ALGORITHMS = ("fedavg", "fedqsn")
COHORT = 1000
"""Clients a round of the large population."""
_TRACED_CALLS = 2


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

    visible, aggregator = masks(), simulation.method.aggregator
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
