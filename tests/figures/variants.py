"""Measures what settings of FedQSN cost of a round, beside FedQSN without them, in pairs.

  python tests/figures/variants.py [--model=dense] [--calls=20]

The workload is that of `benchmarks.workloads`: 100 clients of 28x28 images. Calls of five rounds
alternate; printed is the median time of a round, and the median of the ratios of neighbouring calls
with its quartiles.
"""

import argparse
import statistics

import jax

from fedqsn_jax.benchmarks.measuring import timed_calls
from fedqsn_jax.benchmarks.workloads import (
    MODELS,
    make_population,
    make_workload,
    workload_config,
)
from fedqsn_jax.config.schema import resolve, to_dict, with_fields

PRIVATE = {"privacy.clip": 1.0, "privacy.noise": 1.0, "server.weighting": "uniform"}
VARIANTS = {
    "as it is": {},
    "sticky masks": {"mask_per": "client"},
    "one-way rounds": {"broadcast.every": 0, "server.scale": 1.0},
    "clip and noise": PRIVATE,
    "traced": {"tracing_margin": 0.1},
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--model", choices=MODELS, default="dense")
    options = parser.parse_args()
    data, running = make_population(), {}
    for name, values in VARIANTS.items():
        base = workload_config("fedqsn", data.clients, data.clients, 5)
        config = resolve(to_dict(with_fields(base, values)))
        simulation, params, rows = make_workload(options.model, config, data)
        running[name] = timed_calls(simulation, params, data, rows)
    for each in running.values():
        next(each)
        next(each)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(options.calls):
        for name, each in running.items():
            times[name].append(next(each))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.model}")
    first = times["as it is"]
    for name, values in times.items():
        ratios = [own / base for own, base in zip(values, first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: {1000 * statistics.median(values):.2f} ms a round, "
            f"{middle:.3f} times ({low:.3f} to {high:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
