"""Measures the README's figures on the digits: every view's accuracy over seeds.

  python tests/figures/digits.py --seeds=20 --out=figures.json

Runs configs/digits.py with each algorithm, and FedQSN with stronger masks too, with evaluations at
the start and the last round only, and prints means with 95% confidence intervals (Student's t).
"""

import argparse
import dataclasses
import json
import math
import statistics

import jax
from scipy import stats

from fedqsn_jax.command_line import read_config
from fedqsn_jax.config import Config
from fedqsn_jax.experiment import prepare
from fedqsn_jax.simulation import initial_state, pretrain, run_rounds

SETTINGS = {
    "fedavg": ["fedavg"],
    "fedsn p=.2": ["fedsn"],
    "fedq": ["fedq"],
    "fedqsn p=.2": ["fedqsn"],
    "fedqsn p=.3": ["fedqsn", "--config.p1=0.3", "--config.p2=0.3"],
}


def last_metrics(config: Config, seeds: int) -> list[dict[str, float]]:
    """The last round's metrics of each seed; all seeds share one compiled program."""
    results = []
    compiled = None
    for seed in range(seeds):
        ready = prepare(dataclasses.replace(config, seed=seed))
        compiled = compiled or ready.simulation
        simulation = compiled._replace(config=ready.config)
        task, splits = simulation.task, ready.splits
        params = pretrain(ready.config, ready.pretraining_apply, task, ready.params, splits.private)
        state = initial_state(simulation, params)
        for _, _, entries in run_rounds(simulation, state, splits.clients, splits.test):
            last = entries
        results.append(last[-1])
    return results


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% confidence interval."""
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", help="a JSON file for the table")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="default: all")
    options, overrides = parser.parse_known_args()
    table = {}
    for name in options.only or SETTINGS:
        algorithm, *own = SETTINGS[name]
        overrides_of_all = ["--config.evaluation.every=1000", *own, *overrides]
        config = read_config(f"configs/digits.py:{algorithm}", overrides_of_all)
        results = last_metrics(config, options.seeds)
        views = [key for key in results[0] if key.endswith("/accuracy")]
        table[name] = {view: interval([result[view] for result in results]) for view in views}
        row = "  ".join(
            f"{view} {mean:.4f}±{half:.4f}" for view, (mean, half) in table[name].items()
        )
        print(f"{name}: {row}", flush=True)
    if options.out:
        facts = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        with open(options.out, "w") as file:
            json.dump({**facts, "seeds": options.seeds, "table": table}, file, indent=2)


if __name__ == "__main__":
    main()
