"""Several rounds in one compiled call, and who will take part in them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.types import Array, Batch
from fedqsn_jax.data.population import ClientData, HeldOut
from fedqsn_jax.rounds.federation import Federation, ServerState


def draw_cohorts(federation: Federation, state: ServerState, rounds: int) -> np.ndarray:
    """Returns who takes part in each of a run's rounds, int32 ``[rounds, cohort]``, on the host.

    In empty places of Poisson cohorts stands `poisson.NOBODY`.

    Args:
      federation: The method.
      state: A state of the run; which one does not matter. Of its leaves only the keys need be
        arrays.
      rounds: The run's number of rounds, from the first on.
    """
    cohort = jax.eval_shape(federation.cohort, state).shape[0]
    # So many rounds at once that a draw stays small.
    block = max(1, min(rounds, _DRAWN_AT_ONCE // cohort))

    @jax.jit
    @jax.vmap
    def draw(index: Array) -> Array:
        return federation.cohort(dataclasses.replace(state, round=index))

    blocks = [
        np.asarray(draw(jnp.arange(start, start + block, dtype=jnp.int32)))
        for start in range(0, rounds, block)
    ]
    return np.concatenate([np.zeros((0, cohort), np.int32), *blocks])[:rounds]


_DRAWN_AT_ONCE = 2**22
"""Client ids that `draw_cohorts` draws in one call."""


class CallResult(NamedTuple):
    """What a call of several rounds brings to the host, in one transfer.

    Attributes:
      facts: Of each round, ``[rounds_per_call]``; rounds beyond the call's stop hold zeros.
      metrics: Of each round, ``[rounds_per_call]``; zeros where it was not evaluated.
      evaluated: bool ``[rounds_per_call]``.
    """

    facts: dict[str, Array]
    metrics: dict[str, Array]
    evaluated: Array


def make_rounds(
    federation: Federation,
    *,
    rounds_per_call: int,
    evaluate_every: int,
) -> Callable[
    [ServerState, ClientData, Batch | HeldOut, Array, Array], tuple[ServerState, CallResult]
]:
    """Makes the compiled call that runs several rounds without the host.

    Args:
      federation: The method.
      rounds_per_call: The most rounds a call may run.
      evaluate_every: A round is evaluated if its number is a multiple of this, or the last.

    Returns:
      ``(state, data, test_rows, stop, last) -> (state, CallResult)``, jitted, with the state
      donated. It runs rounds until ``state.round == stop`` (int32 scalar, at most
      ``rounds_per_call`` ahead); ``last`` is the number of the run's last round.
    """

    # Inlined, so that they are traced once for their shapes and for the program.
    run_round = jax.jit(federation.round, inline=True)
    evaluate = jax.jit(federation.evaluate, inline=True)

    def rescaled(state: ServerState, rows: Any) -> tuple[ServerState, dict[str, Array]]:
        assert federation.choose_scale is not None
        state = federation.choose_scale(state, rows)
        return state, evaluate(state, rows)

    def run(
        state: ServerState, data: ClientData, rows: Batch | HeldOut, stop: Array, last: Array
    ) -> tuple[ServerState, CallResult]:
        _, fact_shapes = jax.eval_shape(run_round, state, data)
        metric_shapes = jax.eval_shape(evaluate, state, rows)
        no_metrics = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), metric_shapes)

        def buffer(shape: jax.ShapeDtypeStruct) -> Array:
            return jnp.zeros((rounds_per_call, *shape.shape), shape.dtype)

        result = CallResult(
            jax.tree.map(buffer, fact_shapes),
            jax.tree.map(buffer, metric_shapes),
            jnp.zeros(rounds_per_call, bool),
        )

        def body(index: Array, carry: tuple) -> tuple:
            state, result = carry
            state, facts = run_round(state, data)
            due = (state.round % evaluate_every == 0) | (state.round == last)
            if federation.choose_scale is None:
                metrics = jax.lax.cond(due, lambda: evaluate(state, rows), lambda: no_metrics)
            else:
                state, metrics = jax.lax.cond(
                    due, lambda: rescaled(state, rows), lambda: (state, no_metrics)
                )
            values = CallResult(facts, metrics, due)
            return state, jax.tree.map(lambda all, one: all.at[index].set(one), result, values)

        return jax.lax.fori_loop(0, stop - state.round, body, (state, result))

    return jax.jit(run, donate_argnums=0)
