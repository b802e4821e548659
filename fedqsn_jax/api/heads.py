"""Finds a model's task head by what it does, because users' own models do not name it."""

import math

import jax
import jax.numpy as jnp

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import ApplyFn, Batch, Key, Params


def find_heads(apply_fn: ApplyFn, params: Params, example: Batch, key: Key) -> tuple[str, ...]:
    """Returns the paths of kernels whose columns are the outputs' last axis.

    A kernel is the task head if changing its columns, and its bias's entries, changes the outputs
    in the same way: rolling the columns rolls the outputs, or, where there is one column only,
    doubling it doubles them. That is tried with random values in every tensor, twice.

    Args:
      apply_fn: The model.
      params: Its parameters.
      example: A few examples.
      key: The key of the random values.
    """
    first, second = (_candidates(apply_fn, params, example, k) for k in jax.random.split(key))
    return tuple(path for path in first if path in second)


def _candidates(apply_fn: ApplyFn, params: Params, example: Batch, key: Key) -> list[str]:
    leaves = leaves_by_path(params)
    structure = jax.tree.structure(params)

    def outputs(values: dict) -> jax.Array:
        return apply_fn(jax.tree.unflatten(structure, list(values.values())), example, None)

    def fan_in(shape: tuple[int, ...]) -> int:
        return max(math.prod(shape[:-1]), 1)

    random = {
        path: (
            jax.random.normal(fold_in_name(key, path), leaf.shape) / math.sqrt(fan_in(leaf.shape))
        ).astype(leaf.dtype)
        for path, leaf in leaves.items()
    }
    plain = outputs(random)
    change = _double if plain.shape[-1] == 1 else _roll
    if not jnp.isfinite(plain).all() or _close(plain, change(plain)):
        return []
    heads = []
    for path, leaf in leaves.items():
        if leaf.ndim < 2 or leaf.shape[-1] != plain.shape[-1]:
            continue
        bias = "/".join([*path.split("/")[:-1], "bias"])
        changed = {
            other: change(value) if other in (path, bias) else value
            for other, value in random.items()
        }
        if _close(outputs(changed), change(plain)):
            heads.append(path)
    return heads


def _roll(array: jax.Array) -> jax.Array:
    return jnp.roll(array, 1, axis=-1)


def _double(array: jax.Array) -> jax.Array:
    return 2 * array


def _close(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.allclose(one, other, rtol=1e-3, atol=1e-3 * jnp.abs(other).max())
