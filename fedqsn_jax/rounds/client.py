"""A client's local training on its proxy.

The loss sees the effective parameters ``u = theta * scale``; the optimizer acts on ``theta``, the
values that the client received. Tensors that are not trained are frozen: they have no gradient, no
optimizer's state and no delta. Multiplying by the scale at every step costs about a tenth of a
round, so the loop carries ``u`` and the optimizer is wrapped: gradients are pulled back to
``theta``, updates pushed forward to ``u``. Hidden columns have factor zero: no gradient, no weight
decay, no change.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from fedqsn_jax.core.keys import fold_in_name, keyed_permutation
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import Selection, combine, exclude, select
from fedqsn_jax.core.types import ApplyFn, Array, Columns, Key, Params
from fedqsn_jax.data.population import ClientData
from fedqsn_jax.protocol.masks import spread
from fedqsn_jax.protocol.proxy import Proxy, effective_params
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.stored_kernels import column_factors, stored_kernels
from fedqsn_jax.rounds.client_optimizer import ClientOptimizer


@struct.dataclass
class ClientResult:
    """What a client's round gives.

    Attributes:
      delta: ``theta_end - theta_start``, float32 in the structure of the parameters; zero on
        hidden columns, and None for frozen tensors.
      loss: Mean training loss over the local steps, float32 scalar; zero without steps.
      examples: Number of the client's rows, int32 scalar: its weight in the aggregation.
    """

    delta: Params
    loss: Array
    examples: Array


@struct.dataclass
class Training:
    """A client in the midst of its local training.

    Attributes:
      params: The effective parameters ``theta * scale``, in the parameters' dtypes; None for
        frozen tensors.
      anchor: The same at the start, from which the proximal term measures; None without one.
      frozen: The effective values of frozen tensors that are masked, each client's in its own
        way; None for all others.
      optimizer_state: The optimizer's, which acts on ``theta``.
      steps: Number of the steps so far, int32 scalar.
      loss: Sum of their losses, float32 scalar.
      factors: What ``theta`` is multiplied by in the model, float32 ``[layers, columns]`` a site:
        the site's scale, zero where hidden; a site that is absent has factor 1.
      sites: The mask sites (static).
    """

    params: Params
    anchor: Params | None
    frozen: Params
    optimizer_state: optax.OptState
    steps: Array
    loss: Array
    factors: Columns
    sites: Sites = struct.field(pytree_node=False)

    @property
    def factor_tree(self) -> Params:
        """The factors over the trained parameters, each to broadcast against its tensor."""
        return spread(self.factors, self.params, self.sites, 1.0)


class ClientUpdate(NamedTuple):
    """Local training as pure functions of one client, cut at its steps.

    So a round can train several clients side by side, whatever their numbers of steps; see
    `client_axis.sum_over_clients`. `train` is all of it for one client.

    Attributes:
      step_count: ``rows -> steps``, int32: how many steps a client with so many rows takes. It
        may be stopped before: what it has done by then counts.
      shared: ``proxy -> values``: of a proxy the frozen tensors that no client mask touches, so
        that all clients compute with the same; None for all others. Of the proxy's masks only
        the names matter.
      start: ``(proxy, rows) -> Training`` of a client with so many rows.
      step: ``(key, data, client_id, index, training, shared) -> training``: the step that is
        numbered ``index``, from 0 on. Of what is shared, quantized kernels are computed with as
        they are stored, with the client's factors.
      finish: ``(proxy, rows, training) -> ClientResult`` of a client with so many rows.
    """

    step_count: Callable[[Array], Array]
    shared: Callable[[Proxy], Params]
    start: Callable[[Proxy, Array], Training]
    step: Callable[[Key, ClientData, Array, Array, Training, Params], Training]
    finish: Callable[[Proxy, Array, Training], ClientResult]

    def train(self, key: Key, proxy: Proxy, data: ClientData, client_id: Array) -> ClientResult:
        """Trains one client from start to finish.

        Args:
          key: The client's key in this round.
          proxy: What it received.
          data: The population's rows.
          client_id: The client, int32 scalar.
        """
        rows, shared = data.rows(client_id), self.shared(proxy)

        def body(index: Array, training: Training) -> Training:
            return self.step(key, data, client_id, index, training, shared)

        training = jax.lax.fori_loop(0, self.step_count(rows), body, self.start(proxy, rows))
        return self.finish(proxy, rows, training)


def make_client_update(
    apply_fn: ApplyFn,
    task: Task,
    optimizer: ClientOptimizer,
    batch_size: int,
    *,
    steps: int = 0,
    epochs: int = 1,
    trained: Selection = None,
    proximal: float | Array = 0.0,
) -> ClientUpdate:
    """Makes the local training of one round.

    Args:
      apply_fn: The model.
      task: Its loss.
      optimizer: Acts on the received values, and may depend on the client's number of steps; its
        state starts afresh in each round.
      batch_size: Rows a step. An epoch is ``ceil(rows / batch_size)`` steps over a keyed
        permutation of the client's rows; its last batch may be smaller.
      steps: Number of local steps for every client that has rows; 0 means ``epochs``.
      epochs: Passes over the client's rows, where ``steps`` is 0.
      trained: The tensors that are trained; the others are frozen.
      proximal: FedProx's mu (arXiv 1812.06127): the optimizer minimizes the loss plus
        ``mu / 2 * |theta - theta_start|**2``. The reported loss is without that term. It costs the
        memory of one more copy of the trained parameters.
    """
    is_proximal = not isinstance(proximal, float | int) or proximal != 0

    def shared(proxy: Proxy) -> Params:
        return exclude(exclude(effective_params(proxy), trained), _masked_tensors(proxy))

    def step_count(rows: Array) -> Array:
        count = jnp.int32(steps) if steps else epochs * _steps_per_epoch(rows, batch_size)
        return jnp.where(rows > 0, count, 0).astype(jnp.int32)

    def start(proxy: Proxy, rows: Array) -> Training:
        effective, factors = (
            effective_params(proxy),
            column_factors(proxy.visible, proxy.scale, proxy.sites),
        )
        params = select(effective, trained)
        theta = _pull_back(params, spread(factors, params, proxy.sites, 1.0))
        return Training(
            params=params,
            anchor=params if is_proximal else None,
            frozen=select(exclude(effective, trained), _masked_tensors(proxy)),
            optimizer_state=optimizer(step_count(rows)).init(theta),
            steps=jnp.int32(0),
            loss=jnp.float32(0),
            factors=factors,
            sites=proxy.sites,
        )

    def step(
        key: Key,
        data: ClientData,
        client_id: Array,
        index: Array,
        training: Training,
        shared: Params,
    ) -> Training:
        rows = data.rows(client_id)
        indices, valid = _minibatch(fold_in_name(key, "batches"), index, rows, batch_size)
        batch = data.gather(client_id, indices)
        dropout_key = jax.random.fold_in(fold_in_name(key, "dropout"), index)

        def loss_of(params: Params) -> Array:
            whole = combine(params, training.frozen, shared)
            whole = stored_kernels(whole, training.factors, training.sites)
            return task.loss(apply_fn(whole, batch, dropout_key), batch, valid)

        loss, gradient = jax.value_and_grad(loss_of)(training.params)
        gradient = _push_forward(gradient, training.factor_tree)
        if is_proximal:
            gradient = _with_proximal_term(gradient, training, proximal)
        return _after_step(training, optimizer(step_count(rows)), gradient, loss)

    def finish(proxy: Proxy, rows: Array, training: Training) -> ClientResult:
        delta = _delta(training, select(effective_params(proxy), trained))
        return ClientResult(delta, training.loss / jnp.maximum(training.steps, 1), rows)

    return ClientUpdate(step_count=step_count, shared=shared, start=start, step=step, finish=finish)


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


def _masked_tensors(proxy: Proxy) -> frozenset[str]:
    """The kernels and biases of which each client has its own: masks, or roundings."""
    return proxy.sites.masked_by(proxy.visible).tensors | proxy.traced


def _pull_back(tree: Params, factors: Params) -> Params:
    """From effective values to theta: divides by the factors; zero where they are zero."""

    def divide(leaf: Array, factor: Array) -> Array:
        return jnp.where(factor == 0, 0, leaf / jnp.where(factor == 0, 1, factor))

    return jax.tree.map(divide, tree, factors)


def _push_forward(tree: Params, factors: Params) -> Params:
    """From theta to effective values; a gradient goes the other way so, by the chain rule."""

    def multiply(leaf: Array, factor: Array) -> Array:
        return jnp.where(factor == 0, 0, leaf * factor)

    return jax.tree.map(multiply, tree, factors)


def _delta(training: Training, start: Params) -> Params:
    """What training has changed of theta, float32, from the effective values at its start."""
    # XLA may compute the start twice, once with fused multiply-adds: without a step the difference
    # could be a rounding error, and it must be zero.
    difference = jax.tree.map(
        lambda end, begin: jnp.where(training.steps > 0, end - begin, 0).astype(jnp.float32),
        training.params,
        start,
    )
    return _pull_back(difference, training.factor_tree)


def _with_proximal_term(gradient: Params, training: Training, weight: float | Array) -> Params:
    """The gradient by theta, with that of ``weight / 2 * |theta - theta_start|**2``."""
    moved = jax.tree.map(jnp.subtract, training.params, training.anchor)
    return jax.tree.map(
        lambda slope, way: slope + (weight * way).astype(slope.dtype),
        gradient,
        _pull_back(moved, training.factor_tree),
    )


def _after_step(
    training: Training, optimizer: optax.GradientTransformation, gradient: Params, loss: Array
) -> Training:
    """The client after one step of the optimizer, with the gradient by theta."""
    theta = _pull_back(training.params, training.factor_tree)
    updates, optimizer_state = optimizer.update(gradient, training.optimizer_state, theta)
    updates = _push_forward(updates, training.factor_tree)
    return dataclasses.replace(
        training,
        params=optax.apply_updates(training.params, updates),
        optimizer_state=optimizer_state,
        steps=training.steps + 1,
        loss=training.loss + loss,
    )
