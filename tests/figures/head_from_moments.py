"""What a head by clients' moments keeps of FedAvg's benefit, on the digits: seeds of one's choice.

  python tests/figures/head_from_moments.py --seeds=0,1,2 --features=512

Clients receive nothing of the server's, so the protected share is 1 by construction; see
`api.head_from_moments`. FedAvg runs 30 rounds of `configs/digits.py` from the same start.
"""

import argparse
import itertools

import jax
import numpy as np

from fedqsn_jax.api.head_from_moments import head_from_moments
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.problems.training import pretrain
from fedqsn_jax.runs.preparation import prepare
from fedqsn_jax.simulation.running import initial_state, run_rounds


def of_seed(seed, features, spread):
    """Scores of the start, of FedAvg's end, and of the new head, and the bytes."""
    config = read_config(
        "configs/digits.py:fedavg",
        [f"--config.seed={seed}", "--config.rounds=30", "--config.evaluation.every=30"],
    )
    experiment = prepare(config)
    problem = experiment.problem
    params = pretrain(
        config, problem.pretraining_apply, problem.task, problem.params, experiment.private
    )
    data, test = problem.splits.clients, problem.splits.test
    ends = np.asarray(data.offsets)
    clients = [
        {name: np.asarray(array[begin:end]) for name, array in data.examples.items()}
        for begin, end in itertools.pairwise(ends)
    ]
    solved = head_from_moments(
        problem.apply_fn, params, clients, experiment.private, features=features, spread=spread
    )

    def score(params):
        answers = problem.apply_fn(params, test, None).argmax(-1)
        return float((answers == test["label"]).mean())

    scores = {"start": score(params), "moments": score(solved.params)}
    state = initial_state(experiment.simulation, jax.tree.map(np.asarray, params))
    for _, _, entries in run_rounds(experiment.simulation, state, data, experiment.held_out):
        last = entries
    return {**scores, "fedavg": last[-1]["global/accuracy"]}, solved


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--spread", type=float, default=3.0)
    options = parser.parse_args()
    found = []
    for seed in map(int, options.seeds.split(",")):
        scores, solved = of_seed(seed, options.features, options.spread)
        found.append(scores)
        print(seed, {name: round(value, 4) for name, value in scores.items()}, flush=True)
    mean = {name: np.mean([each[name] for each in found]) for name in found[0]}
    kept = (mean["moments"] - mean["start"]) / (mean["fedavg"] - mean["start"])
    print({name: round(float(value), 4) for name, value in mean.items()}, f"U {kept:.2f}")
    print(f"{solved.bytes_down} bytes down and {solved.bytes_up:,} up, once")


if __name__ == "__main__":
    main()
