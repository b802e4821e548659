"""Measures the README's figures of a configuration: every view's score over seeds.

  python tests/figures/views.py --of=digits --seeds=20 --out=figures.json
  python tests/figures/views.py --of=sst2_minilm --seeds=3 --out=figures.json \\
    --config.data.train=tsv:sst2/train.tsv --config.data.test=tsv:sst2/test.tsv

``--of="sst2_minilm lora"`` trains adapters only, ``--of="sst2_minilm fedsp"`` is FedSP. Runs the
configuration with several settings, evaluating at the start and the last round only, and prints
means with 95% confidence intervals (Student's t).
"""

import argparse
import dataclasses
import json
import math
import statistics

import jax
from scipy import stats

from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import Config
from fedqsn_jax.problems.training import pretrain
from fedqsn_jax.runs.experiment import prepare
from fedqsn_jax.simulation.running import first_entry, initial_state, run_rounds

_P2 = ["--config.p1=0.2", "--config.p2=0.2"]
_P3 = ["--config.p1=0.3", "--config.p2=0.3"]
_RESIDUAL = ["--config.sites=residual"]
DIGITS = {
    "fedavg": ["fedavg"],
    "fedsn p=.2": ["fedsn"],
    "fedq": ["fedq"],
    "fedqsn p=.2": ["fedqsn"],
    "fedqsn p=.3": ["fedqsn", *_P3],
}
SST2 = {
    "fedavg": ["fedavg"],
    "fedqsn p=.1, all": ["fedqsn"],
    "fedqsn p=.2, all": ["fedqsn", *_P2],
    "fedqsn p=.3, all": ["fedqsn", *_P3],
    "fedqsn p=.1, all, 2 bits": ["fedqsn", "--config.bits=2"],
    "fedqsn p=.1, residual": ["fedqsn", *_RESIDUAL],
    "fedqsn p=.2, residual": ["fedqsn", *_RESIDUAL, *_P2],
    "fedqsn p=.3, residual": ["fedqsn", *_RESIDUAL, *_P3],
    "fedqsn p=.1, residual, 2 bits": ["fedqsn", *_RESIDUAL, "--config.bits=2"],
}
_ADAPTERS = ["--config.lora.rank=8", "--config.client.learning_rate=0.001"]
LORA = {
    "fedavg, public base": ["fedavg", "--config.lora.public_base=True", *_ADAPTERS],
    "fedlpp": ["fedlpp", *_ADAPTERS],
    "fedqsn p=.1, all": ["fedqsn", *_ADAPTERS],
    "fedqsn p=.2, all": ["fedqsn", *_P2, *_ADAPTERS],
    "fedqsn p=.3, all": ["fedqsn", *_P3, *_ADAPTERS],
    "fedqsn p=.1, all, 2 bits": ["fedqsn", "--config.bits=2", *_ADAPTERS],
    "fedqsn p=.1, residual": ["fedqsn", *_RESIDUAL, *_ADAPTERS],
}
_ADAM = ["--config.client.optimizer=adam"]
FEDSP = {
    "prompts": ["fedsp"],
    "prompts, Adam": ["fedsp", *_ADAM, "--config.client.learning_rate=0.03"],
    "prompts, no noise": ["fedsp", "--config.fedsp.distillation_noise=0"],
    "prompts, the first layer": ["fedsp", "--config.fedsp.layers=(0,)"],
    "prompts, 6 passes": ["fedsp", "--config.fedsp.passes=6"],
    "prompts, alternating": [
        *("fedsp", "--config.fedsp.auxiliary_share=0.5", "--config.client.steps=32"),
    ],
    "prompts, 64 labelled rows": [
        *("fedsp", "--config.pretraining.steps=96", "--config.pretraining.rows=64"),
        "--config.client.learning_rate=30",
    ],
    "prompts and classifier": [
        *("fedsp", "--config.fedsp.tuned=('prompts','classifier')"),
        *(*_ADAM, "--config.client.learning_rate=0.003"),
    ],
    "classifier": [
        *("fedsp", "--config.fedsp.tuned=('classifier',)"),
        *(*_ADAM, "--config.client.learning_rate=0.003"),
    ],
}
SETTINGS = {
    "digits": DIGITS,
    "sst2_minilm": SST2,
    "sst2_minilm lora": LORA,
    "sst2_minilm fedsp": FEDSP,
}


def last_metrics(config: Config, seeds: int) -> list[dict[str, float]]:
    """The last round's metrics of each seed, and the first's with ``start/`` before their names.

    All seeds share one compiled program.
    """
    results = []
    compiled = None
    for seed in range(seeds):
        ready = prepare(dataclasses.replace(config, seed=seed))
        compiled = compiled or ready.simulation
        simulation = compiled._replace(config=ready.config)
        problem = ready.problem
        splits = problem.splits
        params = pretrain(
            ready.config,
            problem.pretraining_apply,
            problem.task,
            problem.params,
            splits.private,
            problem.preparation,
        )
        state = initial_state(simulation, params)
        start = first_entry(simulation, state, splits.test)
        for _, _, entries in run_rounds(simulation, state, splits.clients, splits.test):
            last = entries
        begun = {f"start/{name}": value for name, value in start.items() if "/" in name}
        results.append(last[-1] | begun)
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
    parser.add_argument("--of", choices=list(SETTINGS), default="digits")
    parser.add_argument("--only", action="append", help="a setting's name; default: all")
    options, overrides = parser.parse_known_args()
    settings = SETTINGS[options.of]
    table = {}
    for name in options.only or settings:
        algorithm, *own = settings[name]
        overrides_of_all = ["--config.evaluation.every=1000", *own, *overrides]
        config = read_config(f"configs/{options.of.split()[0]}.py:{algorithm}", overrides_of_all)
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
