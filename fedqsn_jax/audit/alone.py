"""Attack: no attack at all. What colluders reach with their own rows and no byte of the server's.

The same architecture is trained on the pooled rows, from random weights or from a public base; or
the colluders run a federation of their own, FedAvg (McMahan et al., AISTATS 2017) among themselves.
The best of these is `alone`: what is protected is only what lies above it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedqsn_jax.core.types import ApplyFn, Array, Key, Params
from fedqsn_jax.rounds.fine_tuning import PLACES, Best, Loss, Measure, Tuned, better_of
from fedqsn_jax.rounds.pooled_rows import PooledRows

Federate = Callable[[Params, PooledRows, Array, Array, Key], Tuned]


def members_places(owners: np.ndarray, members: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each member's rows lie among the pooled ones.

    Args:
      owners: For each pooled row the position of its owner among the members, int ``[rows]``.
      members: So many members; more than there are owners: the rest has no rows.

    Returns:
      int32 ``[members, most rows]``, padded by zeros, and the numbers of rows, int32 ``[members]``.
    """
    each = [np.flatnonzero(owners == member) for member in range(members)]
    counts = np.asarray([len(rows) for rows in each], np.int32)
    places = np.zeros((members, max(1, len(owners))), np.int32)
    for member, rows in enumerate(each):
        places[member, : len(rows)] = rows
    return places, counts


def make_colluders_federation(
    apply_fn: ApplyFn,
    loss: Loss,
    measure: Measure,
    *,
    batch_size: int,
    rates: Sequence[float],
    rounds: int,
    local_steps: int,
) -> Federate:
    """Makes ``(start, rows, places, counts, key) -> Tuned``: FedAvg among colluders.

    In each round every member trains the common model with Adam; the weighted mean is the next.

    Args:
      apply_fn: The model, as it is trained.
      loss: The task's.
      measure: What `evaluation.make_held_measure` gives.
      batch_size: Rows a step.
      rates: The rates that are tried.
      rounds: Rounds, of which some are measured.
      local_steps: Steps of each member in a round.
    """

    def lane(
        rate: Array, start: Params, rows: PooledRows, places: Array, counts: Array, key: Key
    ) -> Best:
        optimizer = optax.adam(rate)
        weights = counts / jnp.maximum(counts.sum(), 1)

        def delta(common: Params, own: Array, count: Array, key: Key) -> Params:
            def step(index: Array, carry: tuple) -> tuple:
                params, state = carry
                drawn = jax.random.randint(
                    jax.random.fold_in(key, index), (batch_size,), 0, jnp.maximum(count, 1)
                )
                batch = {name: array[own[drawn]] for name, array in rows.train.items()}
                valid = jnp.ones(batch_size, bool)
                gradient = jax.grad(lambda p: loss(apply_fn(p, batch, None), batch, valid))(params)
                updates, state = optimizer.update(gradient, state, params)
                return optax.apply_updates(params, updates), state

            steps, begin = jnp.where(count > 0, local_steps, 0), (common, optimizer.init(common))
            end, _ = jax.lax.fori_loop(0, steps, step, begin)
            return jax.tree.map(jnp.subtract, end, common)

        def round_(index: Array, common: Params) -> Params:
            def add(member: Array, total: Params) -> Params:
                own_key = jax.random.fold_in(jax.random.fold_in(key, index), member)
                own = delta(common, places[member], counts[member], own_key)
                return jax.tree.map(
                    lambda sum_, d: (sum_ + weights[member] * d).astype(sum_.dtype), total, own
                )

            return jax.lax.fori_loop(0, counts.shape[0], add, common)

        def stretch(place: Array, carry: tuple[Params, Best]) -> tuple[Params, Best]:
            common, best = carry
            end = (place + 1) * rounds // PLACES
            common = jax.lax.fori_loop(place * rounds // PLACES, end, round_, common)
            score, error = measure(common, rows.held, rows.kept)
            return common, better_of(best, Best(common, score, error, end))

        first = Best(start, jnp.float32(-jnp.inf), jnp.float32(jnp.inf), jnp.int32(0))
        return jax.lax.fori_loop(0, PLACES, stretch, (start, first))[1]

    @jax.jit
    def federate(start: Params, rows: PooledRows, places: Array, counts: Array, key: Key) -> tuple:
        best, scores, errors, taken = jax.lax.map(
            lambda rate: lane(rate, start, rows, places, counts, key),
            jnp.asarray(rates, jnp.float32),
        )
        first = jnp.lexsort((errors, -scores))[0]
        return jax.tree.map(lambda each: each[first], (best, scores, taken)), first

    def run(*arguments: Any) -> Tuned:
        (params, score, taken), index = federate(*arguments)
        return Tuned(params, float(list(rates)[int(index)]), int(taken) * local_steps, float(score))

    return run
