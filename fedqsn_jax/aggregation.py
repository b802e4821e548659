"""Folds the clients' deltas into the hidden model.

Deltas are never stacked: each client's is weighted, the weighted deltas add up, and
`Aggregator.finish` turns their sum into a step of an optax optimizer, in full precision.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedqsn_jax.masking import Sites, hide, spread
from fedqsn_jax.trainable import Selection, fill, keep
from fedqsn_jax.types import Array, Columns, Params

Weighting = Literal["data", "uniform"]
Normalization = Literal["mean", "coverage"]
Rule = Literal["delta", "from_sent", "interpolate"]


class Aggregator(NamedTuple):
    """Aggregation as pure functions.

    Attributes:
      init: ``params -> optimizer state``.
      weigh: ``examples -> weights``: a client's weight, float32, from its number of examples; both
        ``[...]``.
      contribute: ``(delta, weight) -> weighted delta`` of one client; these add up.
      finish: ``(params, optimizer_state, total, weights, visible, server_visible, sent=None) ->
        (params, optimizer_state)``, with the sum of weighted deltas, the weights ``[cohort]``, the
        columns that each client saw ``[cohort, layers, columns]`` (a site that is absent was seen
        by all), those that the server does not hide, and what was sent of them, dequantized,
        which the rule ``delta`` does without.
    """

    init: Callable[[Params], optax.OptState]
    weigh: Callable[[Array], Array]
    contribute: Callable[[Params, Array], Params]
    finish: Callable[..., tuple[Params, optax.OptState]]


def make_aggregator(
    sites: Sites,
    optimizer: optax.GradientTransformation,
    *,
    weighting: Weighting = "data",
    normalize: Normalization = "mean",
    rule: Rule = "delta",
    trained: Selection = None,
) -> Aggregator:
    """Makes the aggregation of a run.

    The server optimizer sees the model with hidden columns zeroed, and minus the aggregated delta
    as its gradient; afterwards hidden columns get their values back by selection. So they neither
    change nor influence anything, whatever the optimizer does with norms of tensors. A column that
    nobody saw, and everything in a round without any weight, stays as it is; and so do frozen
    tensors, which the optimizer never meets.

    Args:
      sites: The mask sites.
      optimizer: The server optimizer; ``optax.sgd(1.0)`` adds the mean delta.
      weighting: ``data``: a client weighs its number of examples; ``uniform``: one, if it has any.
      normalize: ``mean``: divide by the weight of all clients; ``coverage``: each column by the
        weight of those that saw it.
      rule: What the optimizer starts from, and where its gradient points. With the sent values
        ``Q``, the mean delta ``D`` and SGD of the rate ``r``, ``delta`` gives ``W + r D``,
        ``from_sent`` ``Q + r D``, and ``interpolate`` ``W + r (Q + D - W)``.
      trained: The tensors that are trained; the others are frozen.
    """

    def init(params: Params) -> optax.OptState:
        # Shapes only: no moment may start from a hidden value.
        return optimizer.init(jax.tree.map(jnp.zeros_like, keep(params, trained)))

    def weigh(examples: Array) -> Array:
        weights = examples.astype(jnp.float32)
        return (weights > 0).astype(jnp.float32) if weighting == "uniform" else weights

    def contribute(delta: Params, weight: Array) -> Params:
        # A client without weight must add nothing, not even NaN times zero.
        return jax.tree.map(lambda leaf: jnp.where(weight > 0, leaf * weight, 0), delta)

    def finish(
        params: Params,
        optimizer_state: optax.OptState,
        total: Params,
        weights: Array,
        visible: Columns,
        server_visible: Columns,
        sent: Params | None = None,
    ) -> tuple[Params, optax.OptState]:
        whole, params = params, keep(params, trained)
        weight = weights.sum()
        coverage = {
            path: jnp.where(seen, weights[:, None, None], 0).sum(axis=0)
            for path, seen in visible.items()
        }
        covered = spread(coverage, params, sites, weight)
        divisor = covered if normalize == "coverage" else jax.tree.map(lambda _: weight, covered)
        gradient = jax.tree.map(lambda delta, by: -_divide(delta, by), total, divisor)
        known = hide(params, sites, server_visible)
        if rule != "delta":
            sent = keep(sent, trained)
            if rule == "interpolate":
                gradient = jax.tree.map(lambda g, w, q: g + (w - q), gradient, known, sent)
            else:
                known = jax.tree.map(lambda w, q: q.astype(w.dtype), known, sent)
        updates, new_state = optimizer.update(gradient, optimizer_state, known)
        new_params = jax.tree.map(
            lambda new, old, seen, cover: jnp.where(seen & (cover > 0), new, old),
            optax.apply_updates(known, updates),
            params,
            spread(server_visible, params, sites, True),
            covered,
        )
        new_state = jax.tree.map(
            lambda new, old: jnp.where(weight > 0, new, old), new_state, optimizer_state
        )
        return fill(new_params, whole), new_state

    return Aggregator(init, weigh, contribute, finish)


def _divide(leaf: Array, weight: Array) -> Array:
    return jnp.where(weight > 0, leaf / jnp.where(weight > 0, weight, 1), 0)
