"""Evaluation of one set of parameters on rows that lie on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Params

Evaluator = Callable[[Params, Batch], dict[str, Array]]
"""``(params, rows) -> metrics`` by name, float32 scalars."""


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
