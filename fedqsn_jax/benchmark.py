"""Seconds of a round on the workloads with which simulators are compared.

  python -m fedqsn_jax.benchmark

A round is 100 clients with 10,258 samples of 28x28 images in lognormal sizes 20 to 400, batch 20,
one local epoch of SGD, no evaluation; the images are noise around 62 prototypes, because speed does
not depend on them. ``cnn`` is `EmnistCNN`, ``dense`` an MLP 784-200-200-62. FedAvg and FedQSN
(p1 = p2 = 0.2, 4 bits) alternate, so that a drifting machine meets both.
"""

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from fedqsn_jax.config import ConfigError, resolve
from fedqsn_jax.data.federated import FederatedData, from_clients
from fedqsn_jax.models.adapters import linen_apply, linen_init
from fedqsn_jax.models.emnist_cnn import EmnistCNN
from fedqsn_jax.models.mlp import MLP
from fedqsn_jax.simulation import Simulation, initial_state, make_simulation
from fedqsn_jax.tasks import classification
from fedqsn_jax.types import Batch, Params

CLASSES = 62
WORKLOADS: dict[str, nn.Module] = {
    "cnn": EmnistCNN(CLASSES),
    "dense": MLP((200, 200), CLASSES),
}
ALGORITHMS = ("fedavg", "fedqsn")


def make_population(clients: int = 100, mean: int = 100, seed: int = 0) -> FederatedData:
    """Makes clients with lognormal numbers of rows, 20 to 400; with the defaults 10,258 in all.

    Args:
      clients: Number of clients.
      mean: About the mean number of rows.
      seed: Seed of sizes, labels and noise.
    """
    generator = np.random.default_rng(seed)
    sizes = generator.lognormal(np.log(mean) - 0.125, 0.5, clients).astype(int).clip(20, 400)
    prototypes = generator.normal(size=(CLASSES, 28, 28, 1)).astype(np.float32)
    rows = []
    for size in sizes:
        labels = generator.integers(0, CLASSES, size).astype(np.int32)
        noise = generator.normal(size=(size, 28, 28, 1)).astype(np.float32)
        rows.append({"image": 0.5 * prototypes[labels] + noise, "label": labels})
    return from_clients(rows)


def round_seconds(
    workload: str, algorithm: str, data: FederatedData, rounds_per_call: int, chunk_size: int
) -> Iterator[float]:
    """Runs call after call and yields the seconds of a round; the first call compiles.

    Args:
      workload: A key of `WORKLOADS`.
      algorithm: The algorithm's name.
      data: The population; all of it takes part in every round.
      rounds_per_call: Rounds in one compiled call.
      chunk_size: Clients a vmapped chunk; 0: what the package chooses.
    """
    never = 2**30
    config = resolve(
        {
            "algorithm": algorithm,
            "rounds": never,
            "rounds_per_call": rounds_per_call,
            "client": {"batch_size": 20, "epochs": 1, "learning_rate": 0.1},
            "cohort": {"size": data.clients, "chunk_size": chunk_size},
            "data": {"clients": data.clients},
            "evaluation": {"every": never, "attackers": ()},
        }
    )
    module = WORKLOADS[workload]
    example = {name: array[:20] for name, array in data.examples.items()}
    params = linen_init(module, jax.random.key(0), example)
    simulation = make_simulation(config, linen_apply(module), classification(), params, data)
    return timed_calls(simulation, params, data, example)


def timed_calls(
    simulation: Simulation, params: Params, data: FederatedData, rows: Batch
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
    for stop in itertools.count(per_call, per_call):
        began = time.perf_counter()
        state, result = simulation.run(state, data, rows, jax.device_put(np.int32(stop)), last)
        jax.block_until_ready((state, result))
        yield (time.perf_counter() - began) / per_call


def measure(
    workload: str, data: FederatedData, calls: int, rounds_per_call: int, chunk_size: int
) -> dict[str, Any]:
    """Measures one workload, algorithms in turn; seconds of a round, JSON-able."""
    running = {
        name: round_seconds(workload, name, data, rounds_per_call, chunk_size)
        for name in ALGORITHMS
    }
    compiling = {name: next(each) * rounds_per_call for name, each in running.items()}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(calls):
        for name, each in running.items():
            times[name].append(next(each))
    facts = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        facts[name] = {
            "median": median,
            "quartiles": [low, high],
            "best": min(values),
            "first_call": compiling[name],
        }
    ratios = [ours / base for ours, base in zip(times["fedqsn"], times["fedavg"], strict=True)]
    return {"algorithms": facts, "fedqsn_over_fedavg": statistics.median(ratios)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 after a mistake of the user's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--calls", type=int, default=10, help="measured calls of each algorithm")
    parser.add_argument("--rounds_per_call", type=int, default=5)
    parser.add_argument("--chunk_size", type=int, default=0, help="clients a vmapped chunk")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--profile", type=Path, help="a directory for a JAX profiler trace")
    options = parser.parse_args(arguments)
    facts: dict[str, Any] = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "chunk_size": options.chunk_size,
        "workloads": {},
    }
    table = Table("workload", "algorithm", title=f"JAX {facts['jax']}, {facts['device']}")
    for name in ("ms a round", "quartiles", "best", "over FedAvg"):
        table.add_column(name, justify="right")
    data = make_population()
    trace = (
        jax.profiler.trace(str(options.profile)) if options.profile else contextlib.nullcontext()
    )
    try:
        with trace:
            for workload in options.workload or WORKLOADS:
                result = measure(
                    workload, data, options.calls, options.rounds_per_call, options.chunk_size
                )
                facts["workloads"][workload] = result
    except ConfigError as error:
        print(f"fedqsn_jax: {error}", file=sys.stderr)
        return 2
    for workload, result in facts["workloads"].items():
        for name, times in result["algorithms"].items():
            low, high = times["quartiles"]
            ratio = f"{result['fedqsn_over_fedavg']:.3f}" if name == "fedqsn" else ""
            milliseconds = (f"{1000 * times['median']:.2f}", f"{1000 * low:.2f}-{1000 * high:.2f}")
            table.add_row(workload, name, *milliseconds, f"{1000 * times['best']:.2f}", ratio)
    Console().print(table)
    if options.out:
        options.out.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
