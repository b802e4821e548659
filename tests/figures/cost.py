"""Measures what FedQSN's rounds cost over FedAvg's on the digits, without evaluation.

  python tests/figures/cost.py

Both are compiled first; then calls of five rounds alternate. Printed are the median times of a
round, their quartiles, and the median of the ratios of neighbouring calls.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import jax
import numpy as np

from fedqsn_jax.command_line import read_config
from fedqsn_jax.data import registry
from fedqsn_jax.models.adapters import linen_apply, linen_init
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.randomness import fold_in_name
from fedqsn_jax.simulation import initial_state, make_simulation, root_key
from fedqsn_jax.tasks import classification

ROUNDS_A_CALL = 5


def calls(algorithm: str) -> Iterator[float]:
    """Runs call after call and yields the seconds of a round; the first call compiles."""
    never = ["--config.evaluation.every=1000000", "--config.rounds=1000000"]
    config = read_config(f"configs/digits.py:{algorithm}", never)
    splits = registry.load(config.data, config.seed)
    module = make_model(config.model, splits.num_classes, config.client.dropout)
    example = {name: rows[:1] for name, rows in splits.test.items()}
    params = linen_init(module, fold_in_name(root_key(config), "model"), example)
    simulation = make_simulation(
        config, linen_apply(module), classification(), params, splits.clients.clients
    )
    state = initial_state(simulation, params)
    last = jax.device_put(np.int32(config.rounds))
    stop = 0
    while True:
        stop += ROUNDS_A_CALL
        began = time.perf_counter()
        target = jax.device_put(np.int32(stop))
        state, result = simulation.run(state, splits.clients, splits.test, target, last)
        jax.block_until_ready((state, result))
        yield (time.perf_counter() - began) / ROUNDS_A_CALL


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
