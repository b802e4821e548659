"""What lies on a device during a round: the memory contract, and how much of it there is.

A round keeps, on every device:

- the server's state (its dtypes, donated from call to call, so there is one copy of it): hidden
  model, server optimizer, server mask, the attackers' copies; in one-way rounds also the first
  model and the sum of all deltas (float32), with rarer broadcasts what was sent last, of what
  clients return;
- one dequantized ``Q(W)`` (float32) for all clients, and the client masks (bool, a byte a column
  and client of the cohort);
- one sum of weighted deltas (float32): deltas are never stacked for a cohort;
- for each client of the chunk its effective weights, a gradient, its optimizer's state (the
  parameters' dtypes) and what the backward pass saves of the forward pass; and the effective
  weights of those that take others' places; of frozen tensors only its own masked ones, and the
  matrices that adapters are merged into, with those' gradients (none, where dense layers take
  adapters as they are);
- where clients keep residuals (``upload.error_feedback``), a copy of the trained kernels of sites,
  float32, for every client of the population, and another for every client of the cohort;
- the rows of the clients: all of them where they live on the device, otherwise those of two calls,
  the one that runs and the next.

So memory grows with the chunk, not with the number of clients a round; but for residuals.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import Selection, combine, exclude, select, tree_bytes
from fedqsn_jax.core.types import ApplyFn, Batch, Params
from fedqsn_jax.rounds.client_optimizer import ClientOptimizer


def saved_activations(
    apply_fn: ApplyFn, task: Task, params: Params, batch: Batch, trained: Selection = None
) -> int:
    """Bytes of `saved_leaves`: what a backward pass saves of the forward pass."""
    return tree_bytes(saved_leaves(apply_fn, task, params, batch, trained))


def saved_leaves(
    apply_fn: ApplyFn, task: Task, params: Params, batch: Batch, trained: Selection = None
) -> list[jax.ShapeDtypeStruct]:
    """Shapes of what a backward pass saves of the forward pass, parameters left out.

    Args:
      apply_fn: The model.
      task: Its loss.
      params: The parameters, or their shapes.
      batch: One minibatch, or its shapes.
      trained: The tensors that are trained.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]

    def residuals(params: Params, batch: Batch) -> Any:
        def loss(some: Params) -> jax.Array:
            outputs = apply_fn(combine(some, exclude(params, trained)), batch, jax.random.key(0))
            return task.loss(outputs, batch, jnp.ones(rows, bool))

        return jax.vjp(loss, select(params, trained))[1]

    saved = jax.eval_shape(residuals, params, batch)
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
    return [x for x in jax.tree.leaves(saved) if (x.shape, x.dtype) not in weights]


def client_bytes(
    apply_fn: ApplyFn,
    task: Task,
    optimizer: ClientOptimizer,
    params: Params,
    batch: Batch,
    *,
    trained: Selection = None,
    proximal: float = 0.0,
) -> int:
    """Bytes that one more client of a chunk takes while it trains.

    Args:
      apply_fn: The model.
      task: Its loss.
      optimizer: The local optimizer.
      params: The parameters, or their shapes.
      batch: One minibatch, or its shapes.
      trained: The tensors that are trained; copies of frozen ones are not counted.
      proximal: The weight of a proximal term, which needs the parameters of the start.
    """
    some = select(params, trained)
    state = jax.eval_shape(lambda params: optimizer(jnp.int32(1)).init(params), some)
    activations = saved_activations(apply_fn, task, params, batch=batch, trained=trained)
    # Effective weights, gradient, perhaps the weights of the start; optimizer state; the batch;
    # what is saved, and one cotangent of about the same size in the worst case.
    copies = 3 if proximal else 2
    return copies * tree_bytes(some) + tree_bytes(state) + tree_bytes(batch) + 2 * activations


class OutOfMemoryError(ConfigError):
    """A run that a device's memory does not hold; the message is one line and says what to set."""


@contextlib.contextmanager
def answer_out_of_memory(
    config: Config, chunk_size: int, outcome: Callable[[], str] = str, points: int = 1
) -> Iterator[None]:
    """Turns a device's running out of memory into an answer for the user.

    Args:
      config: The settings.
      chunk_size: Clients that are trained at once on a device.
      outcome: Says what became of the run; called only when it failed.
      points: Points of a sweep that are run side by side.

    Raises:
      OutOfMemoryError: Instead of XLA's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if points > 1:
            advice = (
                f"--at_once={points}: the device ran out of memory with so many points side by "
                f"side; try {points // 2}"
            )
        elif chunk_size > 1:
            advice = (
                f"cohort.chunk_size = {chunk_size}: the device ran out of memory; try "
                f"{chunk_size // 2}, or cohort.parallelism = 'scan', one client at a time"
            )
        else:
            advice = (
                f"cohort.chunk_size = 1: the device ran out of memory with one client at a time; "
                f"lower client.batch_size = {config.client.batch_size} or evaluation.batch_size = "
                f"{config.evaluation.batch_size}, or set data.resident = 'host'"
            )
        told = outcome()
        raise OutOfMemoryError(f"{advice}; {told}" if told else advice) from error
