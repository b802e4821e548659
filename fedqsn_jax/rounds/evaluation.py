"""Evaluation of one set of parameters on rows that lie on the device, of all or client by client.

Metrics of clients one by one are condensed to their mean, their worst tenth and their spread.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Params
from fedqsn_jax.data.population import FederatedData

Evaluator = Callable[[Params, Batch], dict[str, Array]]
"""``(params, rows) -> metrics`` by name, float32 scalars."""

ClientEvaluator = Callable[[Params, FederatedData], dict[str, Array]]
"""``(params, clients' rows) -> metrics`` by name, float32 scalars."""


def make_evaluator(apply_fn: ApplyFn, task: Task, batch_size: int) -> Evaluator:
    """Makes the pure function that evaluates parameters on all rows of a data set.

    Args:
      apply_fn: The model; it is called without a key, so without dropout.
      task: Gives the statistics, and the metrics from their sums.
      batch_size: Rows at a time; the last batch is masked.
    """

    def evaluate(params: Params, rows: Batch) -> dict[str, Array]:
        count = jax.tree.leaves(rows)[0].shape[0]
        size = min(batch_size, count)
        batches = -(-count // size)
        positions = jnp.arange(batches * size, dtype=jnp.int32).reshape(batches, size)

        def statistics(indices: Array) -> dict[str, Array]:
            batch = {name: rows[name][jnp.minimum(indices, count - 1)] for name in rows}
            return task.statistics(apply_fn(params, batch, None), batch, indices < count)

        sums = jax.lax.map(statistics, positions)
        return task.summarize({name: each.sum(axis=0) for name, each in sums.items()})

    # Inlined: several views are evaluated, and the model is traced once.
    return jax.jit(evaluate, inline=True)


def make_client_evaluator(apply_fn: ApplyFn, task: Task, batch_size: int) -> ClientEvaluator:
    """Makes the pure function that evaluates one set of parameters on many clients' rows.

    Every metric is averaged over the clients that have rows, each counting the same. Of the
    task's score there are ``SCORE_worst_decile``, the mean of the tenth of the clients (at least
    one, rounded up) with the lowest scores, and ``SCORE_spread``, the population standard deviation
    over clients.

    Args:
      apply_fn: The model; it is called without a key, so without dropout.
      task: Gives the statistics of a row, and the metrics from their sums.
      batch_size: Rows at a time; the last batch is masked.
    """

    def per_client(params: Params, data: FederatedData) -> tuple[dict[str, Array], Array]:
        count = jax.tree.leaves(data.examples)[0].shape[0]
        size = min(batch_size, count)
        batches = -(-count // size)
        positions = jnp.arange(batches * size, dtype=jnp.int32).reshape(batches, size)

        def statistics(indices: Array) -> dict[str, Array]:
            last = jnp.minimum(indices, count - 1)
            batch = {name: rows[last] for name, rows in data.examples.items()}

            def of_row(output: Array, row: Batch, valid: Array) -> dict[str, Array]:
                one = jax.tree.map(lambda leaf: leaf[None], (output, row, valid))
                return task.statistics(*one)

            return jax.vmap(of_row)(apply_fn(params, batch, None), batch, indices < count)

        rows = jax.lax.map(statistics, positions)
        owner = jnp.searchsorted(data.offsets, positions.reshape(-1), side="right") - 1
        sums = {
            # Rows of padding lie behind the last client's: they are dropped.
            name: jax.ops.segment_sum(each.reshape(-1), owner, num_segments=data.clients)
            for name, each in rows.items()
        }
        return task.summarize(sums), jnp.diff(data.offsets) > 0

    def evaluate(params: Params, data: FederatedData) -> dict[str, Array]:
        metrics, present = per_client(params, data)
        clients = present.sum()

        def mean(values: Array) -> Array:
            return jnp.where(present, values, 0).sum() / clients

        scores = metrics[task.score]
        worst = jnp.sort(jnp.where(present, scores, jnp.inf))
        tenth = (clients + 9) // 10
        is_worst = jnp.arange(worst.shape[0]) < tenth
        average = mean(scores)
        return {
            **{name: mean(values) for name, values in metrics.items()},
            f"{task.score}_worst_decile": jnp.where(is_worst, worst, 0).sum() / tenth,
            f"{task.score}_spread": jnp.sqrt(mean(jnp.square(scores - average))),
        }

    # Inlined: several views are evaluated, and the model is traced once.
    return jax.jit(evaluate, inline=True)


def make_held_measure(
    apply_fn: ApplyFn, task: Task, batch_size: int
) -> Callable[[Params, Batch, Array], tuple[Array, Array]]:
    """Makes ``(params, rows, count) -> (score, loss)`` on the first ``count`` rows; pure.

    Rows after the count are padding. The loss decides between equal scores, which few rows have;
    where a task's metrics have no loss it is zero.
    """

    def measure(params: Params, rows: Batch, count: Array) -> tuple[Array, Array]:
        places = jax.tree.leaves(rows)[0].shape[0]
        size = min(batch_size, places)
        batches = -(-places // size)
        indices = jnp.arange(batches * size, dtype=jnp.int32).reshape(batches, size)

        def some(chosen: Array) -> dict[str, Array]:
            batch = {name: array[jnp.minimum(chosen, places - 1)] for name, array in rows.items()}
            valid = chosen < jnp.minimum(count, places)
            return task.statistics(apply_fn(params, batch, None), batch, valid)

        sums = jax.lax.map(some, indices)
        metrics = task.summarize({name: each.sum(axis=0) for name, each in sums.items()})
        loss = metrics.get("loss", jnp.float32(0))
        return metrics[task.score].astype(jnp.float32), loss.astype(jnp.float32)

    return measure
