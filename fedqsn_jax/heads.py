"""Finds a model's task head by what it does, because users' own models do not name it."""

import jax
import jax.numpy as jnp

from fedqsn_jax.masking import leaves_by_path
from fedqsn_jax.randomness import fold_in_name
from fedqsn_jax.types import ApplyFn, Batch, Key, Params


def find_heads(apply_fn: ApplyFn, params: Params, example: Batch, key: Key) -> tuple[str, ...]:
    """Returns the paths of kernels whose columns are the outputs' last axis.

    A kernel is the task head if rolling its last axis, and its bias's, rolls the outputs. That is
    tried with random values in every tensor, so that it cannot happen by chance.

    Args:
      apply_fn: The model.
      params: Its parameters.
      example: A few examples.
      key: The key of the random values.
    """
    leaves = leaves_by_path(params)
    structure = jax.tree.structure(params)

    def outputs(values: dict) -> jax.Array:
        return apply_fn(jax.tree.unflatten(structure, list(values.values())), example, None)

    random = {
        path: jax.random.normal(fold_in_name(key, path), leaf.shape, leaf.dtype)
        / jnp.sqrt(jnp.float32(leaf.shape[0] if leaf.ndim > 1 else 1)).astype(leaf.dtype)
        for path, leaf in leaves.items()
    }
    plain = outputs(random)
    heads = []
    for path, leaf in leaves.items():
        if leaf.ndim < 2 or leaf.shape[-1] != plain.shape[-1] or leaf.shape[-1] == 1:
            continue
        bias = "/".join([*path.split("/")[:-1], "bias"])
        rolled = {
            other: jnp.roll(value, 1, axis=-1) if other in (path, bias) else value
            for other, value in random.items()
        }
        if jnp.allclose(outputs(rolled), jnp.roll(plain, 1, axis=-1), rtol=1e-3, atol=1e-5):
            heads.append(path)
    return tuple(heads)
