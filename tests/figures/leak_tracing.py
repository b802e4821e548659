"""Who is found of the clients of whose copies a model was made, and what tracing costs: digits.

  python tests/figures/leak_tracing.py [margin ...]

For each margin and three seeds a run of the digits is made. Of 1, 2, 5 and 10 colluders each keeps
the latest copy of every column that it received; the mean of these models is leaked, as it is and
after 100 and 1,000 steps of Adam on all their rows.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedqsn_jax.audit.case import Case, case_of_run
from fedqsn_jax.audit.leak_tracing import trace
from fedqsn_jax.audit.received import Payloads, hold
from fedqsn_jax.audit.replay import payload_layout, replay
from fedqsn_jax.audit.union import union_model
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import resolve, to_dict, with_fields
from fedqsn_jax.reporting.display import silent_display
from fedqsn_jax.rounds.pooled_rows import client_rows
from fedqsn_jax.runs import experiment

SEEDS = (0, 1, 2)
COLLUDERS = (1, 2, 5, 10)
STEPS = (0, 100, 1000)
RATE, BATCH = 1e-3, 32
FALSE_ALARM = 1e-3


def finished(margin: float, seed: int, directory: Path) -> tuple[Case, float]:
    """A run, and the score of the owner's model."""
    values = {"tracing_margin": margin, "seed": seed, "evaluation.every": 60}
    config = resolve(to_dict(with_fields(read_config("configs/digits.py", []), values)))
    experiment.run(config, directory, silent_display())
    case = case_of_run(directory)
    metrics = jax.jit(case.simulation.federation.evaluate)(case.final, case.held_out)
    return case, float(metrics["global/accuracy"])


def copies(case: Case, members: list[int], directory: Path) -> list:
    """What each of the members holds at the end: a model of its own copies alone."""
    payloads = Payloads(directory)
    replay(case, members, payloads.keep, lambda _: None)
    like, layout = case.sent(case.final.params), payload_layout(case)
    return [
        union_model(case, hold(payloads.read(layout, [one]), [one], like, case.sites))
        for one in members
    ]


def trained(case: Case, params: dict, members: list[int], steps: int) -> dict:
    """The same after so many steps on the members' rows."""
    each = [client_rows(case.data, member) for member in members]
    rows = {name: jnp.concatenate([own[name] for own in each]) for name in each[0]}
    count = len(rows["label"])
    optimizer = optax.adam(RATE)

    def step(index, carry):
        params, state = carry
        drawn = jax.random.randint(jax.random.fold_in(jax.random.key(5), index), (BATCH,), 0, count)
        batch = {name: array[drawn] for name, array in rows.items()}

        def loss(params):
            outputs = case.train_apply(params, batch, jax.random.key(0))
            return case.task.loss(outputs, batch, jnp.ones(BATCH, bool))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry))
    return run((params, optimizer.init(params)))[0]


def main(margins: list[float]) -> None:
    """Prints a line for each margin, number of colluders and number of steps."""
    for margin in margins:
        owners, lines = [], {}
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                case, owner = finished(margin, seed, Path(folder) / "run")
                owners.append(owner)
                if not margin:
                    continue
                order = np.random.default_rng(seed).permutation(case.data.clients)
                kept = Path(folder) / "received"
                kept.mkdir()
                everyone = copies(case, [int(k) for k in order[: max(COLLUDERS)]], kept)
                leaked = {}
                for count in COLLUDERS:
                    mean = jax.tree.map(lambda *each: sum(each) / len(each), *everyone[:count])
                    for steps in STEPS:
                        members = [int(k) for k in order[:count]]
                        leaked[count, steps] = trained(case, mean, members, steps)
                for (count, steps), found in zip(
                    leaked, trace(case, list(leaked.values())), strict=True
                ):
                    members = {int(k) for k in order[:count]}
                    named = {s.client for s in found if s.false_alarm <= FALSE_ALARM}
                    least = min(s.score for s in found if s.client in members)
                    most = max(s.score for s in found if s.client not in members)
                    lines.setdefault((count, steps), []).append(
                        (len(named & members), len(named - members), least, most)
                    )
        print(f"margin {margin}: owner {np.mean(owners):.4f} ({np.round(owners, 4)})", flush=True)
        for (count, steps), seen in lines.items():
            right, wrong, least, most = np.asarray(seen).T
            print(
                f"  {count} averaged, {steps} steps: found {right.mean():.1f} of {count}, wrongly "
                f"{wrong.sum():.0f}; least score {least.min():.1f}, innocent {most.max():.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main([float(text) for text in sys.argv[1:]] or [0.0, 0.05, 0.1, 0.2, 0.4])
