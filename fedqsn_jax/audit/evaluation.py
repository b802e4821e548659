"""What a model says of each test row: its statistics and its answer; do owner and thief agree?"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Params


class Answers(NamedTuple):
    """A model's answers to rows, on the host.

    Attributes:
      sums: The task's statistics of each row, float32 ``[rows]`` by name.
      choice: The likeliest output, int ``[rows, ...]``: the largest along the last axis.
    """

    sums: dict[str, np.ndarray]
    choice: np.ndarray


def make_answering(
    apply_fn: ApplyFn, task: Task, batch_size: int
) -> Callable[[Params, Batch], Answers]:
    """Makes ``(params, rows) -> Answers``, which asks a model so many rows at a time."""

    def of_row(outputs: Array, batch: Batch) -> dict[str, Array]:
        one = jax.tree.map(lambda array: array[None], batch)
        return task.statistics(outputs[None], one, jnp.ones(1, bool))

    @jax.jit
    def ask(params: Params, rows: Batch) -> tuple[dict[str, Array], Array]:
        count = jax.tree.leaves(rows)[0].shape[0]
        size = min(batch_size, count)
        batches = -(-count // size)
        places = jnp.arange(batches * size, dtype=jnp.int32).reshape(batches, size)

        def some(indices: Array) -> tuple[dict[str, Array], Array]:
            batch = {name: array[jnp.minimum(indices, count - 1)] for name, array in rows.items()}
            outputs = apply_fn(params, batch, None)
            return jax.vmap(of_row)(outputs, batch), outputs.argmax(-1)

        answers = jax.lax.map(some, places)
        return jax.tree.map(lambda each: each.reshape(-1, *each.shape[2:])[:count], answers)

    def answer(params: Params, rows: Batch) -> Answers:
        return Answers(*jax.device_get(ask(params, rows)))

    return answer


def fidelity(thief: Answers, owner: Answers) -> float:
    """Share of the test rows (of their outputs) on which a thief's model answers as the owner's.

    Jagielski et al., High Accuracy and High Fidelity Extraction of Neural Networks (2020).
    """
    return float(np.mean(thief.choice == owner.choice))


def score_of(answers: Answers, task: Task) -> float:
    """The task's score over all rows."""
    return float(
        task.summarize({name: each.sum() for name, each in answers.sums.items()})[task.score]
    )
