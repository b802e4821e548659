"""What the kernels of convolutions share: whole divisions, and rows of flat images."""

from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.gpu_blocks import grid_of
from fedqsn_jax.models.kernels.triton_backend import triton


def div(value: Array, divisor: int) -> Array:
    """The quotient of numbers that are not negative: ``//`` would also check their sign."""
    return jax.lax.div(value, jnp.full_like(value, divisor))


def rem(value: Array, divisor: int) -> Array:
    """The remainder of numbers that are not negative."""
    return jax.lax.rem(value, jnp.full_like(value, divisor))


def load_rows(ref: Any, index: Array, exists: Array, channels: Array) -> Array:
    """Loads ``[index, channels]``, zero where an index does not exist."""
    at = grid_of(jnp.where(exists, index, 0), channels)
    mask = jnp.broadcast_to(exists[:, None], at[0].shape)
    return triton.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))


def store_rows(ref: Any, index: Array, channels: Array, exists: Array, values: Array) -> None:
    """Stores ``[index, channels]`` where an index exists."""
    # Beyond the end, not at an index that another element writes: the interpreter scatters all.
    at = grid_of(jnp.where(exists, index, ref.shape[0]), channels)
    mask = jnp.broadcast_to(exists[:, None], at[0].shape)
    triton.store(ref.at[at], values.astype(ref.dtype), mask=mask)
