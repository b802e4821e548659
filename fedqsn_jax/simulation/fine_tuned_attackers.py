"""What colluders reach who train, on rows of their own, all that they have received.

A run's attackers hold the latest copy of every column (`rounds.views`) and use it as it is. Thieves
train it: here they do, once, after the last round, with `rounds.fine_tuning`, the attack that the
audit calls *union, all weights tuned*. The audit plays many more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedqsn_jax.config.schema import FEDSP, Config
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.trees import combine, exclude, tree_bytes
from fedqsn_jax.core.types import ApplyFn, Batch, Params
from fedqsn_jax.data.population import ClientData, FederatedData
from fedqsn_jax.host.devices import device_bytes, own_copy
from fedqsn_jax.models.functional import in_compute_dtype
from fedqsn_jax.rounds.evaluation import make_evaluator, make_held_measure
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.rounds.fine_tuning import (
    COPIES,
    RATES,
    everything,
    known_entries,
    make_fine_tuning,
)
from fedqsn_jax.rounds.pooled_rows import divide, pooled_rows
from fedqsn_jax.rounds.views import Attacker, attacker_params, has_received
from fedqsn_jax.simulation.compose import Simulation


class TrainedAttacker(NamedTuple):
    """What came of one coalition's training.

    Attributes:
      score: The task's score on the test rows.
      rate: Adam's rate, chosen on the rows that the coalition held back.
      steps: The number of steps, chosen likewise; 0: training made nothing better there.
      rows: Number of rows that it trained on.
      held_rows: Number of rows that it held back.
    """

    score: float
    rate: float
    steps: int
    rows: int
    held_rows: int


def trains_attackers(config: Config) -> bool:
    """Whether a run asks for attackers that train."""
    return config.evaluation.fine_tuned_attackers > 0 and config.algorithm != FEDSP


def train_attackers(
    simulation: Simulation,
    state: ServerState,
    apply_fn: ApplyFn,
    client_apply: ApplyFn | None,
    data: ClientData,
    test: Batch,
) -> dict[str, TrainedAttacker]:
    """Lets every attacker of a run train what it holds on its members' rows.

    A fifth of the rows is held back: rate and number of steps are chosen on them, never on the
    test rows. What does not belong to a hidden column is trained. Adapters are merged first.

    Args:
      simulation: The method.
      state: Its state after the last round.
      apply_fn: The plain model, as it is evaluated.
      client_apply: The same as clients train it; None: as it is evaluated, computing in the
        clients' dtype.
      data: The clients' rows.
      test: The test rows.

    Returns:
      What came of it by the attacker's name; without those that have received nothing, or have
      fewer than two rows.
    """
    config, task = simulation.config, simulation.task
    state, test = own_copy(state), own_copy(test)
    if isinstance(data, FederatedData):
        data = own_copy(data)
    size = config.evaluation.batch_size
    train_apply = client_apply or in_compute_dtype(apply_fn, config.client.compute_dtype)
    room = device_bytes() // 4
    fine_tune = make_fine_tuning(
        train_apply,
        task.loss,
        make_held_measure(apply_fn, task, size),
        batch_size=config.client.batch_size,
        rates=RATES,
        at_once=max(1, min(len(RATES), room // max(1, COPIES * tree_bytes(state.params)))),
    )
    evaluate = jax.jit(make_evaluator(apply_fn, task, size))
    key = fold_in_name(root_key(config.seed), "fine_tuned_attackers")
    own = {
        name: divide(data, [int(member) for member in attacker.members], config.seed)
        for name, attacker in state.attackers.items()
        if has_received(attacker)
    }
    counts = {
        name: tuple(len(next(iter(rows.values()))) for rows in (each.train, each.held))
        for name, each in own.items()
    }
    # Of one width, so that all coalitions share a program.
    most = (max((n[0] for n in counts.values()), default=0),
            max((n[1] for n in counts.values()), default=0))  # fmt: skip
    found = {}
    for name, each in own.items():
        if not counts[name][0]:
            continue
        start, trainable = _start(simulation, state, state.attackers[name])
        rows = pooled_rows(each.train, each.held, most)
        steps = config.evaluation.fine_tuned_attackers
        tuned = fine_tune(start, trainable, rows, steps, fold_in_name(key, name))
        score = float(evaluate(tuned.params, test)[task.score])
        found[name] = TrainedAttacker(score, tuned.rate, tuned.steps, *counts[name])
    return found


def _start(simulation: Simulation, state: ServerState, attacker: Attacker) -> tuple[Params, Params]:
    """The plain model that an attacker has, and which of its entries it trains."""
    roles = simulation.roles
    public = exclude(exclude(state.params, roles.sent), roles.withheld)

    @jax.jit
    def make(attacker: Attacker, state: ServerState, public: Params) -> Params:
        prepared = simulation.federation.prepare(state).params
        scaled = attacker_params(attacker, simulation.sites, prepared)
        return simulation.merged(combine(scaled, public))

    start = jax.tree.map(jnp.asarray, make(attacker, state, public))
    if simulation.lora is not None:
        return start, everything(start)
    return start, known_entries(start, attacker.known, simulation.sites)
