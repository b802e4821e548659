"""Folds the clients' deltas into the hidden model.

Deltas are never stacked: each client's is weighted, the weighted deltas add up, and
`Aggregator.finish` turns their sum into a step of an optax optimizer, in full precision. An update
that is not finite is rejected: it weighs nothing, and no mean counts it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedqsn_jax.core.trees import Selection, combine, select
from fedqsn_jax.core.types import Array, Columns, Params
from fedqsn_jax.protocol.masks import hide, spread
from fedqsn_jax.protocol.sites import Sites

Weighting = Literal["data", "uniform"]
Normalization = Literal["mean", "coverage"]
Rule = Literal["delta", "from_sent", "interpolate"]


@struct.dataclass
class Contribution:
    """What one client adds to a round, or the sum of what several do.

    Attributes:
      delta: The delta times the weight, float32.
      weight: The weight, float32 scalar; zero if the update was rejected.
      coverage: The weight at the columns that the client saw, float32 ``[layers, columns]`` a
        site; a site that is absent was seen by all.
      rejected: How many updates were rejected, uint32 scalar.
    """

    delta: Params
    weight: Array
    coverage: Columns
    rejected: Array


class Aggregator(NamedTuple):
    """Aggregation as pure functions.

    Attributes:
      init: ``params -> optimizer state``.
      weigh: ``examples -> weights``: a client's weight, float32, from its number of examples; both
        ``[...]``.
      contribute: ``(delta, weight, visible) -> Contribution`` of one client, which saw the columns
        ``[layers, columns]``; contributions add up.
      finish: ``(params, optimizer_state, total, server_visible, sent=None) -> (params,
        optimizer_state)``, with the sum of the contributions, the columns that the server does not
        hide, and what was sent of them, dequantized, which the rule ``delta`` does without.
      rescale: ``(params, optimizer_state, server_visible, scale) -> (params, optimizer_state)``
        of a running mean: ``finish`` without a new contribution, with another scale. None for
        others.
    """

    init: Callable[[Params], optax.OptState]
    weigh: Callable[[Array], Array]
    contribute: Callable[[Params, Array, Columns], Contribution]
    finish: Callable[..., tuple[Params, optax.OptState]]
    rescale: Callable[..., tuple[Params, optax.OptState]] | None = None


def make_aggregator(
    sites: Sites,
    optimizer: optax.GradientTransformation,
    *,
    weighting: Weighting = "data",
    normalize: Normalization = "mean",
    rule: Rule = "delta",
    trained: Selection = None,
    clip_norm: float = 0.0,
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
      clip_norm: Largest L2 norm of a client's delta, all tensors together; a longer one is
        shortened to it. 0: no clipping.
    """

    def init(params: Params) -> optax.OptState:
        # Shapes only: no moment may start from a hidden value.
        return optimizer.init(jax.tree.map(jnp.zeros_like, select(params, trained)))

    def contribute(delta: Params, weight: Array, visible: Columns) -> Contribution:
        return _contribution(delta, weight, visible, clip_norm)

    def finish(
        params: Params,
        optimizer_state: optax.OptState,
        total: Contribution,
        server_visible: Columns,
        sent: Params | None = None,
    ) -> tuple[Params, optax.OptState]:
        whole, params, weight = params, select(params, trained), total.weight
        covered = spread(total.coverage, params, sites, weight)
        divisor = covered if normalize == "coverage" else jax.tree.map(lambda _: weight, covered)
        gradient = jax.tree.map(lambda delta, by: -_divide(delta, by), total.delta, divisor)
        known = hide(params, sites, server_visible)
        if rule != "delta":
            sent = select(sent, trained)
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
        return combine(new_params, whole), new_state

    weigh = functools.partial(_weights, weighting=weighting)
    return Aggregator(init=init, weigh=weigh, contribute=contribute, finish=finish)


@struct.dataclass
class RunningMean:
    """What the server keeps of all deltas of a run.

    Attributes:
      delta: The sum of the weighted deltas so far, float32.
      weight: The sum of their weights, float32 scalar.
      coverage: The sums of the weights at the columns that clients saw, float32 ``[layers,
        columns]`` a site; empty where each column is divided by the weight of all.
      scale: What the mean is multiplied by, float32 scalar.
    """

    delta: Params
    weight: Array
    coverage: Columns
    scale: Array


def make_running_mean(
    sites: Sites,
    *,
    scale: float | Array = 1.0,
    weighting: Weighting = "data",
    normalize: Normalization = "mean",
    trained: Selection = None,
    clip_norm: float = 0.0,
) -> Aggregator:
    """Makes the aggregation of one-way rounds, whose clients always start at the first model.

    Their deltas are samples of one and the same quantity. So the model after any round is
    ``W_0 + scale * (sum of weighted deltas so far) / (sum of their weights)``; ``finish`` takes
    ``W_0`` as its ``params``. Hidden columns, columns that nobody has seen yet, and frozen tensors
    keep the values of ``W_0``.

    Args:
      sites: The mask sites.
      scale: What the mean is multiplied by, until ``rescale`` says otherwise.
      weighting: As of `make_aggregator`.
      normalize: As there.
      trained: As there.
      clip_norm: As there.
    """

    def init(params: Params) -> RunningMean:
        own = select(params, trained)
        covers = normalize == "coverage"
        return RunningMean(
            delta=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), own),
            weight=jnp.float32(0),
            coverage={
                site.path: jnp.zeros((site.layers, site.columns), jnp.float32)
                for site in (sites.drawing if covers else ())
            },
            scale=jnp.asarray(scale, jnp.float32),
        )

    def contribute(delta: Params, weight: Array, visible: Columns) -> Contribution:
        return _contribution(delta, weight, visible, clip_norm)

    def finish(
        params: Params,
        mean: RunningMean,
        total: Contribution,
        server_visible: Columns,
        sent: Params | None = None,
    ) -> tuple[Params, RunningMean]:
        del sent
        mean = RunningMean(
            delta=jax.tree.map(jnp.add, mean.delta, total.delta),
            weight=mean.weight + total.weight,
            coverage={
                # A site without a mask was seen by all.
                path: covered + total.coverage.get(path, total.weight)
                for path, covered in mean.coverage.items()
            },
            scale=mean.scale,
        )
        return rescale(params, mean, server_visible, mean.scale)

    def rescale(
        params: Params, mean: RunningMean, server_visible: Columns, scale: Array
    ) -> tuple[Params, RunningMean]:
        start = select(params, trained)
        moved = jax.tree.map(
            lambda old, delta, seen, by: jnp.where(
                seen & (by > 0), (old + scale * _divide(delta, by)).astype(old.dtype), old
            ),
            start,
            mean.delta,
            spread(server_visible, start, sites, True),
            spread(mean.coverage, start, sites, mean.weight),
        )
        return combine(moved, params), dataclasses.replace(mean, scale=scale)

    weigh = functools.partial(_weights, weighting=weighting)
    return Aggregator(init=init, weigh=weigh, contribute=contribute, finish=finish, rescale=rescale)


def _weights(examples: Array, weighting: Weighting) -> Array:
    weights = examples.astype(jnp.float32)
    return (weights > 0).astype(jnp.float32) if weighting == "uniform" else weights


def _contribution(delta: Params, weight: Array, visible: Columns, clip_norm: float) -> Contribution:
    squared_norm = sum(
        (jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(delta)),
        jnp.float32(0),
    )
    # With a finite square no sum of deltas can overflow.
    accepted = (weight > 0) & jnp.isfinite(squared_norm)
    counted = jnp.where(accepted, weight, 0)
    factor = counted
    if clip_norm:
        norm = jnp.sqrt(squared_norm)
        factor = counted * jnp.where(norm > clip_norm, clip_norm / norm, 1)
    return Contribution(
        # A selection: a client without weight must add nothing, not even NaN times zero.
        delta=jax.tree.map(lambda leaf: jnp.where(accepted, leaf * factor, 0), delta),
        weight=counted,
        coverage={path: jnp.where(seen, counted, 0) for path, seen in visible.items()},
        rejected=((weight > 0) & ~accepted).astype(jnp.uint32),
    )


def _divide(leaf: Array, weight: Array) -> Array:
    return jnp.where(weight > 0, leaf / jnp.where(weight > 0, weight, 1), 0)
