"""Attack: a model is trained on the answers of the owner's model to so many queries.

Orekondy, Schiele, Fritz, Knockoff Nets: Stealing Functionality of Black-Box Models, CVPR 2019: the
thief asks for class probabilities and minimizes the cross-entropy to them. It asks with its own
rows first, and when these are used up with mixtures of two of them: averages of numbers (Zhang et
al., mixup, ICLR 2018), and for integers, such as tokens, each position from one of the two.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedqsn_jax.core.types import ApplyFn, Array, Batch, Params

TEACHER = "teacher"
"""The name of the owner's answers among a batch's arrays."""


def queries(
    rows: dict[str, np.ndarray], count: int, seed: int
) -> tuple[dict[str, np.ndarray], int]:
    """Chooses what is asked.

    Args:
      rows: The colluders' rows; at least one.
      count: The number of queries.
      seed: Draws them.

    Returns:
      ``count`` rows, and how many of them are rows as they are; the others are mixtures.
    """
    generator = np.random.default_rng(seed)
    own = len(next(iter(rows.values())))
    plain = min(count, own)
    order = generator.permutation(own)[:plain]
    left, right = (generator.integers(0, own, count - plain) for _ in range(2))
    share = generator.uniform(size=count - plain)
    coins: dict[tuple[int, ...], np.ndarray] = {}

    def one(array: np.ndarray) -> np.ndarray:
        first, second = array[left], array[right]
        if np.issubdtype(array.dtype, np.floating):
            weight = share.reshape(-1, *(1,) * (array.ndim - 1)).astype(array.dtype)
            mixed = weight * first + (1 - weight) * second
        elif array.ndim > 1:
            # Arrays of one shape, such as tokens and their mask, keep their positions together.
            if first.shape not in coins:
                coins[first.shape] = generator.uniform(size=first.shape) < 0.5
            mixed = np.where(coins[first.shape], first, second)
        else:
            mixed = first
        return np.concatenate([array[order], mixed])

    return {name: one(array) for name, array in rows.items()}, plain


def distillation_loss(outputs: Array, batch: Batch, valid: Array) -> Array:
    """The mean cross-entropy to the owner's probabilities, over valid rows."""
    each = optax.softmax_cross_entropy(outputs.astype(jnp.float32), batch[TEACHER])
    return jnp.where(valid, each, 0).sum() / jnp.maximum(valid.sum(), 1)


def answers_of(apply_fn: ApplyFn, params: Params, rows: Batch, batch_size: int) -> Array:
    """The owner's class probabilities for rows, float32 ``[rows, classes]``."""
    count = jax.tree.leaves(rows)[0].shape[0]
    size = min(batch_size, count)
    places = jnp.arange(-(-count // size) * size).reshape(-1, size)

    @jax.jit
    def ask(params: Params, rows: Batch) -> Array:
        def some(indices: Array) -> Array:
            batch = {name: array[jnp.minimum(indices, count - 1)] for name, array in rows.items()}
            return jax.nn.softmax(apply_fn(params, batch, None).astype(jnp.float32))

        answers = jax.lax.map(some, places)
        return answers.reshape(-1, answers.shape[-1])[:count]

    return ask(params, rows)
