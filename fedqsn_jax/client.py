"""A client's local training on its proxy.

The loss sees the effective parameters ``u = theta * scale``; the optimizer acts on ``theta``, the
values that the client received. Multiplying by the scale at every step costs about a tenth of a
round, so the loop carries ``u`` and the optimizer is wrapped: gradients are pulled back to
``theta``, updates pushed forward to ``u``. Hidden columns have factor zero: no gradient, no weight
decay, no change.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedqsn_jax.data.federated import FederatedData
from fedqsn_jax.masking import spread
from fedqsn_jax.proxy import Proxy, effective_params
from fedqsn_jax.randomness import fold_in_name, keyed_permutation
from fedqsn_jax.tasks import Task
from fedqsn_jax.types import ApplyFn, Array, Batch, Key, Params


@struct.dataclass
class ClientResult:
    """What a client's round gives.

    Attributes:
      delta: ``theta_end - theta_start``, float32 in the structure of the parameters; zero on
        hidden columns.
      loss: Mean training loss over the local steps, float32 scalar; zero without steps.
      examples: Number of the client's rows, int32 scalar: its weight in the aggregation.
    """

    delta: Params
    loss: Array
    examples: Array


class ClientUpdate(NamedTuple):
    """Local training as two pure functions.

    Attributes:
      step_count: ``rows -> steps``, int32: how many steps a client with so many rows takes.
      update: ``(key, proxy, data, client_id, bound) -> ClientResult``. ``bound`` is at least the
        client's number of steps; steps beyond the client's own change nothing, so that clients of
        one vmapped chunk can share the bound of the longest.
    """

    step_count: Callable[[Array], Array]
    update: Callable[[Key, Proxy, FederatedData, Array, Array], ClientResult]


def make_client_update(
    apply_fn: ApplyFn,
    task: Task,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    *,
    steps: int = 0,
    epochs: int = 1,
) -> ClientUpdate:
    """Makes the local training of one round.

    Args:
      apply_fn: The model.
      task: Its loss.
      optimizer: Acts on the received values; its state starts afresh in each round.
      batch_size: Rows a step. An epoch is ``ceil(rows / batch_size)`` steps over a keyed
        permutation of the client's rows; its last batch may be smaller.
      steps: Number of local steps for every client that has rows; 0 means ``epochs``.
      epochs: Passes over the client's rows, where ``steps`` is 0.
    """

    def step_count(rows: Array) -> Array:
        count = jnp.int32(steps) if steps else epochs * _steps_per_epoch(rows, batch_size)
        return jnp.where(rows > 0, count, 0).astype(jnp.int32)

    def update(
        key: Key, proxy: Proxy, data: FederatedData, client_id: Array, bound: Array
    ) -> ClientResult:
        start, rows = data.start(client_id), data.rows(client_id)
        count = step_count(rows)
        initial = effective_params(proxy)
        factors = _factors(proxy, initial)
        batch_key, dropout_key = fold_in_name(key, "batches"), fold_in_name(key, "dropout")

        def loss_fn(params: Params, batch: Batch, valid: Array, step: Array) -> Array:
            outputs = apply_fn(params, batch, jax.random.fold_in(dropout_key, step))
            return task.loss(outputs, batch, valid)

        def body(step: Array, carry: tuple) -> tuple:
            params, optimizer_state, loss_sum = carry
            indices, valid = _minibatch(batch_key, step, rows, batch_size)
            batch = data.gather(start + indices)
            loss, gradient = jax.value_and_grad(loss_fn)(params, batch, valid, step)
            new_params, new_state = _wrapped_step(
                optimizer, gradient, optimizer_state, params, factors
            )
            active = step < count
            params, optimizer_state = jax.tree.map(
                lambda new, old: jnp.where(active, new, old),
                (new_params, new_state),
                (params, optimizer_state),
            )
            return params, optimizer_state, loss_sum + jnp.where(active, loss, 0)

        carry = (initial, optimizer.init(_pull_back(initial, factors)), jnp.float32(0))
        final, _, loss_sum = jax.lax.fori_loop(jnp.int32(0), bound, body, carry)
        # XLA may compute the start twice, once with fused multiply-adds: without a step the
        # difference could be a rounding error, and it must be zero.
        difference = jax.tree.map(
            lambda end, begin: jnp.where(count > 0, end - begin, 0).astype(jnp.float32),
            final,
            initial,
        )
        delta = _pull_back(difference, factors)
        return ClientResult(delta, loss_sum / jnp.maximum(count, 1), rows)

    return ClientUpdate(step_count, update)


def _steps_per_epoch(rows: Array, batch_size: int) -> Array:
    return (rows + (batch_size - 1)) // batch_size


def _minibatch(key: Key, step: Array, rows: Array, batch_size: int) -> tuple[Array, Array]:
    """Row indices int32 ``[batch_size]`` of a step, and which of them count."""
    per_epoch = jnp.maximum(_steps_per_epoch(rows, batch_size), 1)
    epoch = step // per_epoch
    positions = (step - epoch * per_epoch) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    valid = positions < rows
    last = jnp.maximum(rows - 1, 0)
    permutation_key = jax.random.fold_in(key, epoch)
    return keyed_permutation(permutation_key, jnp.minimum(positions, last), last + 1), valid


def _factors(proxy: Proxy, params: Params) -> Params:
    """What theta is multiplied by in the model, over the tree: the scale, zero where hidden."""
    factors = {}
    for site in proxy.sites:
        if site.path in proxy.visible or site.path in proxy.scale:
            visible = proxy.visible.get(site.path, jnp.ones((site.layers, site.columns), bool))
            factors[site.path] = jnp.where(visible, proxy.scale.get(site.path, 1.0), 0.0)
    return spread(factors, params, proxy.sites, 1.0)


def _pull_back(tree: Params, factors: Params) -> Params:
    """From effective values to theta: divides by the factors; zero where they are zero."""

    def divide(leaf: Array, factor: Array) -> Array:
        return jnp.where(factor == 0, 0, leaf / jnp.where(factor == 0, 1, factor))

    return jax.tree.map(divide, tree, factors)


def _push_forward(tree: Params, factors: Params) -> Params:
    """From theta to effective values; also the way of gradients, whose chain rule it is."""

    def multiply(leaf: Array, factor: Array) -> Array:
        return jnp.where(factor == 0, 0, leaf * factor)

    return jax.tree.map(multiply, tree, factors)


def _wrapped_step(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    optimizer_state: optax.OptState,
    params: Params,
    factors: Params,
) -> tuple[Params, optax.OptState]:
    updates, optimizer_state = optimizer.update(
        _push_forward(gradient, factors), optimizer_state, _pull_back(params, factors)
    )
    return optax.apply_updates(params, _push_forward(updates, factors)), optimizer_state
