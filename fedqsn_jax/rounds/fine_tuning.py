"""Training as a thief does it: several rates side by side, rate and steps chosen on held-back rows.

The optimizer is Adam (arXiv 1412.6980) with a rate that rises for 6% of the steps and then falls
linearly, as in the fine-tuning of BERT. What is best on the rows that the colluders hold back is
kept, of all rates and of four places on the way; the test rows play no part.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import path_of
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Columns, Key, Params
from fedqsn_jax.protocol.masks import spread
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.rounds.client_optimizer import warmup_and_decay
from fedqsn_jax.rounds.pooled_rows import PooledRows

RATES = (1e-4, 5e-4, 2e-3, 1e-2)
"""Adam's rates that a thief tries."""

COPIES = 8
"""Copies of the parameters that a training has at once: start, best, gradients, moments."""

PLACES = 4
"""How often on its way a training is measured on the held-back rows."""

Loss = Callable[[Array, Batch, Array], Array]
Measure = Callable[[Params, Batch, Array], tuple[Array, Array]]


class Tuned(NamedTuple):
    """What came of a training.

    Attributes:
      params: The best of all rates and places.
      rate: Its rate.
      steps: After how many steps; 0: training made nothing better.
      held_score: Its score on the held-back rows.
    """

    params: Params
    rate: float
    steps: int
    held_score: float


FineTune = Callable[[Params, Params, PooledRows, int, Key], Tuned]


class Best(NamedTuple):
    """The best place of a training so far.

    Attributes:
      params: The parameters there.
      score: On the held-back rows, float32 scalar.
      error: The loss there, float32 scalar.
      place: After how many steps, or rounds, int32 scalar.
    """

    params: Params
    score: Array
    error: Array
    place: Array


def better_of(kept: Best, new: Best) -> Best:
    """The new place if its score is larger, or equal with a smaller loss; else the kept one."""
    # Written so that NaN is never better.
    better = (new.score > kept.score) | ((new.score == kept.score) & (new.error < kept.error))
    return jax.tree.map(lambda ours, theirs: jnp.where(better, ours, theirs), new, kept)


def make_fine_tuning(
    apply_fn: ApplyFn,
    loss: Loss,
    measure: Measure,
    *,
    batch_size: int,
    rates: Sequence[float],
    at_once: int,
) -> FineTune:
    """Makes ``(start, trainable, rows, steps, key) -> Tuned``; one program for all starts.

    Args:
      apply_fn: The model, as it is trained.
      loss: The task's, or another with the same arguments.
      measure: What `evaluation.make_held_measure` gives.
      batch_size: Rows a step, drawn with replacement.
      rates: The rates that are tried.
      at_once: How many of them are trained side by side.

    In the function that is made ``trainable`` is a tree of bool arrays in the shapes of the
    parameters: only entries where it is True change.
    """

    def lane(
        rate: Array, start: Params, trainable: Params, rows: PooledRows, steps: Array, key: Key
    ) -> Best:
        optimizer = optax.adam(warmup_and_decay(rate, steps))  # type: ignore[arg-type]

        def step(index: Array, carry: tuple) -> tuple:
            params, state = carry
            drawn = jax.random.randint(
                jax.random.fold_in(key, index), (batch_size,), 0, jnp.maximum(rows.trained, 1)
            )
            batch = {name: array[drawn] for name, array in rows.train.items()}
            own_key = fold_in_name(jax.random.fold_in(key, index), "dropout")
            valid = jnp.ones(batch_size, bool)
            gradient = jax.grad(lambda p: loss(apply_fn(p, batch, own_key), batch, valid))(params)
            updates, state = optimizer.update(gradient, state, params)
            updates = jax.tree.map(lambda u, on: jnp.where(on, u, 0), updates, trainable)
            return optax.apply_updates(params, updates), state

        def stretch(place: Array, carry: tuple) -> tuple:
            params, state, best = carry
            begin, end = place * steps // PLACES, (place + 1) * steps // PLACES
            params, state = jax.lax.fori_loop(begin, end, step, (params, state))
            score, error = measure(params, rows.held, rows.kept)
            return params, state, better_of(best, Best(params, score, error, end))

        score, error = measure(start, rows.held, rows.kept)
        first = Best(start, jnp.nan_to_num(score, nan=-jnp.inf), error, jnp.int32(0))
        carry = (start, optimizer.init(start), first)
        return jax.lax.fori_loop(0, PLACES, stretch, carry)[2]

    @jax.jit
    def tune(start: Params, trainable: Params, rows: PooledRows, steps: Array, key: Key) -> tuple:
        def one(rate: Array) -> tuple:
            return lane(rate, start, trainable, rows, steps, key)

        best, scores, errors, taken = jax.lax.map(
            one, jnp.asarray(rates, jnp.float32), batch_size=at_once
        )
        # Of equal scores the smaller loss, then the smaller rate.
        first = jnp.lexsort((errors, -scores))[0]
        return jax.tree.map(lambda each: each[first], (best, scores, taken)), first

    def fine_tune(
        start: Params, trainable: Params, rows: PooledRows, steps: int, key: Key
    ) -> Tuned:
        (params, score, taken), lane_index = tune(start, trainable, rows, jnp.int32(steps), key)
        rate = list(rates)[int(lane_index)]
        return Tuned(params, rate, int(taken), float(score))

    return fine_tune


def everything(params: Params) -> Params:
    """A tree that lets all entries change."""
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)


def known_entries(params: Params, known: Columns, sites: Sites) -> Params:
    """A tree that lets change what is known, and whatever belongs to no site.

    Of a model with adapters, merged into their matrices, every entry.
    """
    here = set(_paths(params))
    own = Sites(site for site in sites if site.path in here)
    seen = spread(known, params, own, True)
    return jax.tree.map(lambda leaf, on: jnp.broadcast_to(on, leaf.shape), params, seen)


def _paths(params: Params) -> list[str]:
    return [path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
