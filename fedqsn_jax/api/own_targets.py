"""Rows of a user's own in which nothing is to be predicted: left out, and told.

Such a row, as one whose completion was cut off entirely, has no loss; but in the aggregation it
would weigh as much as any other.
"""

import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.api.own_rows import Rows
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.types import Array, Batch
from fedqsn_jax.data.streamed import HostData

_ROWS_AT_A_TIME = 4096


def leave_out_idle_rows(
    task: Task, outputs: jax.ShapeDtypeStruct, clients: HostData, others: Mapping[str, Rows]
) -> tuple[HostData, dict[str, Rows]]:
    """Returns the rows in which something is to be predicted; of others it is warned.

    Rows of which none is left out are not copied.

    Args:
      task: Its statistics say by ``count`` whether a row has a target; see `tasks.Task`.
      outputs: What the model makes of one row.
      clients: The clients' rows.
      others: Others' rows, by whose they are.

    Raises:
      ValueError: Of the clients, or of others, there is no row left.
    """
    if task.label is not None:  # Every label is one to be predicted.
        return clients, dict(others)
    offsets = np.asarray(clients.offsets)
    first, last = int(offsets[0]), int(offsets[-1])
    own = {name: array[first:last] for name, array in clients.examples.items()}
    kept = _told(_have_targets(task, outputs, own), "clients")
    if not kept.all():
        examples = {name: array[kept] for name, array in own.items()}
        before = np.concatenate([[0], np.cumsum(kept)])
        clients = HostData(examples, before[offsets - first])
    left = {}
    for where, rows in others.items():
        kept = _told(_have_targets(task, outputs, rows), where)
        left[where] = rows if kept.all() else {name: each[kept] for name, each in rows.items()}
    return clients, left


def _have_targets(task: Task, outputs: jax.ShapeDtypeStruct, rows: Rows) -> np.ndarray:
    """Whether each row has a target, bool ``[rows]``."""

    def count(row: Batch) -> Array:
        one = {name: array[None] for name, array in row.items()}
        # Whatever the model says of it: what the count does not depend on is not computed.
        anything = jnp.zeros((1, *outputs.shape[1:]), outputs.dtype)
        statistics = task.statistics(anything, one, jnp.ones(1, bool))
        return jnp.asarray(statistics.get("count", 1.0))

    counts = jax.jit(jax.vmap(count))
    total = len(next(iter(rows.values())))
    found = [np.zeros(0, bool)]
    for start in range(0, total, _ROWS_AT_A_TIME):
        piece = {name: array[start : start + _ROWS_AT_A_TIME] for name, array in rows.items()}
        found.append(np.asarray(counts(piece)) != 0)
    return np.concatenate(found)


def _told(kept: np.ndarray, where: str) -> np.ndarray:
    idle = int((~kept).sum())
    if idle == len(kept):
        raise ValueError(
            f"{where}: none of the {idle} rows has a target: nothing is to be predicted; allowed "
            f"are rows of which the task's statistics count some"
        )
    if idle:
        warnings.warn(
            f"{where}: {idle} of {len(kept)} rows are left out, as they have no target: nothing is "
            f"to be predicted in them",
            stacklevel=5,
        )
    return kept
