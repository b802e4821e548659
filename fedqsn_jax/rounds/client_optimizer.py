"""Optimizers of one client's round, which may depend on how many steps that client takes.

In a federation an epoch is as long as a client's data, and a learning rate that warms up and decays
within the round must know that length. It is known only at run time, where it is an array; so a
client's optimizer is a function of it, called once for each client and round. Its state starts
afresh each time.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from fedqsn_jax.core.types import Array

ClientOptimizer = Callable[[Array], optax.GradientTransformation]
"""``steps -> optimizer``: ``steps`` is the client's number of local steps, an int32 scalar that may
be traced; the transformation must not depend on it in structure, only in values."""


ADAMW_EPSILON = 1e-6
"""What ``transformers.AdamW`` adds to the root of the second moment, and so the paper's code."""


def unscheduled(optimizer: optax.GradientTransformation) -> ClientOptimizer:
    """Returns the client optimizer that is the same for every number of steps."""
    return lambda steps: optimizer


def warmup_and_decay(
    learning_rate: float, updates: Array | int, warmup: float = 0.06
) -> optax.Schedule:
    """A rate that rises linearly to its peak and falls linearly towards zero.

    Of ``n`` updates the first ``w = floor(warmup * n) + 1`` (at most ``n``) have the rates ``1/w``,
    ``2/w``, ..., 1, the rest ``(n-w)/(n-w+1)``, ..., ``1/(n-w+1)`` times the peak: the schedule
    that transformers calls ``linear`` for ``n + 1`` updates, without its first one, whose rate is
    zero. The released code of FedQSN keeps that one, so that a client with a single update
    learns nothing there.

    Args:
      learning_rate: The peak.
      updates: How often the optimizer is applied, ``n``; an integer scalar, may be traced.
      warmup: Share of the updates until the peak.

    Raises:
      ValueError: The share is not in [0, 1].
    """
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup = {warmup}: allowed is 0 to 1")
    count = jnp.maximum(jnp.asarray(updates, jnp.float32), 1)
    peak = jnp.minimum(jnp.floor(warmup * count) + 1, count)

    def schedule(update: Array) -> Array:
        step = jnp.asarray(update, jnp.float32)
        falling = jnp.maximum(count - step, 0) / (count - peak + 1)
        return learning_rate * jnp.minimum((step + 1) / peak, falling)

    return schedule


def scheduled(
    make: Callable[[Any], optax.GradientTransformation],
    learning_rate: float,
    *,
    schedule: str = "linear",
    warmup: float = 0.06,
    accumulate: int = 1,
    clip_norm: float = 0.0,
) -> ClientOptimizer:
    """An optimizer whose rate follows the client's round.

    Args:
      make: From a learning rate, a number or an optax schedule, to an optimizer.
      learning_rate: The rate; its peak where it changes.
      schedule: ``linear``: see `warmup_and_decay`; ``constant``.
      warmup: Share of the updates until the peak, where it changes.
      accumulate: Steps whose gradients are averaged into one update. The last update of a round
        averages what is left, so no gradient is lost or carried into the next round. Each step
        weighs the same, however many rows or tokens its batch has.
      clip_norm: Largest global norm of an update's gradient; 0: no clipping.

    Raises:
      ValueError: A setting is out of range.

    Example: the local training of the paper's language models, as the released code has it::

      def adamw(rate):
          return optax.adamw(rate, eps=ADAMW_EPSILON, weight_decay=0.01)

      optimizer = scheduled(adamw, 2e-5)(jnp.int32(32))
      state = optimizer.init(params)
    """
    if accumulate < 1:
        raise ValueError(f"accumulate = {accumulate}: allowed is 1 or more")
    if not clip_norm >= 0:
        raise ValueError(f"clip_norm = {clip_norm}: allowed is 0 or more")
    if schedule not in ("linear", "constant"):
        raise ValueError(f"schedule = {schedule!r}: allowed are linear, constant")
    warmup_and_decay(learning_rate, 1, warmup)  # Checks the share before anything is traced.

    def optimizer(steps: Array) -> optax.GradientTransformation:
        updates = (steps + (accumulate - 1)) // accumulate
        follows = schedule == "linear"
        inner = make(warmup_and_decay(learning_rate, updates, warmup) if follows else learning_rate)
        if clip_norm:
            inner = optax.chain(optax.clip_by_global_norm(clip_norm), inner)
        if accumulate == 1:
            return inner

        def steps_of(update: Array) -> Array:
            # Beyond the client's own steps the value does not matter, as long as it is no zero.
            return jnp.clip(steps - update * accumulate, 1, accumulate)

        return optax.MultiSteps(inner, steps_of).gradient_transformation()

    return optimizer
