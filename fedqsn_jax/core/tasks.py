"""Tasks: the loss that is trained, and the statistics that are reported.

A batch is padded to a static size; ``valid`` says which rows count. Statistics are sums over rows,
so that they add up over batches, and over clients, whatever the padding. A metric of no rows is
NaN, which says that it is absent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from fedqsn_jax.core.types import Array, Batch


class Task(NamedTuple):
    """What a model's outputs are for.

    Attributes:
      loss: ``(outputs, batch, valid) -> float32`` scalar, the mean over valid rows.
      statistics: ``(outputs, batch, valid) -> sums`` by name, float32 scalars; with ``count``, the
        number of valid rows that have a target: in which something is to be predicted.
      summarize: ``sums -> metrics`` by name, of the sums over any number of batches; it is also
        applied to arrays of sums.
      score: The name of the metric that says how good a model is; larger is better.
      label: Where the outputs are logits ``[rows, classes]``, the name of the integers ``[rows]``
        in a batch that say which is right; None where they are something else.
    """

    loss: Callable[[Array, Batch, Array], Array]
    statistics: Callable[[Array, Batch, Array], dict[str, Array]]
    summarize: Callable[[dict[str, Array]], dict[str, Array]]
    score: str
    label: str | None = None


_MEANS = {"accuracy": "correct", "loss": "loss"}


def mean(total: Array, count: Array) -> Array:
    """Returns ``total / count``; NaN where nothing was counted: there is no mean."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), jnp.nan)


def classification(label: str = "label") -> Task:
    """Classification by softmax cross-entropy.

    Outputs are logits ``[rows, classes]``, labels integers ``[rows]``; metrics are ``accuracy``
    (share of rows, 0 to 1) and ``loss`` (nats a row).

    Args:
      label: The name of the labels in a batch.
    """

    def losses(outputs: Array, batch: Batch, valid: Array) -> Array:
        logits = outputs.astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch[label])
        return jnp.where(valid, each, 0)

    def loss(outputs: Array, batch: Batch, valid: Array) -> Array:
        return losses(outputs, batch, valid).sum() / jnp.maximum(valid.sum(), 1)

    def statistics(outputs: Array, batch: Batch, valid: Array) -> dict[str, Array]:
        correct = (outputs.argmax(-1) == batch[label]) & valid
        return {
            "loss": losses(outputs, batch, valid).sum(),
            "correct": correct.sum(dtype=jnp.float32),
            "count": valid.sum(dtype=jnp.float32),
        }

    def summarize(sums: dict[str, Array]) -> dict[str, Array]:
        return {name: mean(sums[each], sums["count"]) for name, each in _MEANS.items()}

    return Task(loss, statistics, summarize, score="accuracy", label=label)
