"""Measures what FedQSN's rounds cost over FedAvg's on the digits, without evaluation.

  python tests/figures/cost.py

Both are compiled first; then calls of five rounds alternate. Printed are the median times of a
round, their quartiles, and the median of the ratios of neighbouring calls.
"""

import argparse
import statistics
from collections.abc import Iterator

import jax

from fedqsn_jax.benchmarks.measuring import timed_calls
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.runs.experiment import prepare


def calls(algorithm: str) -> Iterator[float]:
    """Runs call after call and yields the seconds of a round; the first call compiles."""
    never = ["--config.evaluation.every=1000000"]
    ready = prepare(read_config(f"configs/digits.py:{algorithm}", never))
    splits = ready.problem.splits
    return timed_calls(ready.simulation, ready.problem.params, splits.clients, splits.test)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=40)
    options = parser.parse_args()
    running = {name: calls(name) for name in ("fedavg", "fedqsn")}
    for each in running.values():
        next(each)
        next(each)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(options.calls):
        for name, each in running.items():
            times[name].append(next(each))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.calls} calls each")
    for name, values in times.items():
        low, median, high = (1000 * q for q in statistics.quantiles(values, n=4))
        print(f"{name}: {median:.2f} ms a round (quartiles {low:.2f} to {high:.2f})")
    ratios = [ours / base for ours, base in zip(times["fedqsn"], times["fedavg"], strict=True)]
    print(f"fedqsn / fedavg: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
