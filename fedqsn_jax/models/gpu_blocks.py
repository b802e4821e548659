"""What the Pallas kernels for NVIDIA GPUs share: loading and storing blocks of matrices.

Triton's blocks have sizes that are powers of two; what sticks out of a matrix is masked.
"""

import itertools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas import triton

from fedqsn_jax.types import Array


@struct.dataclass
class Packed:
    """Vectors side by side, as one operand of kernels.

    A vector that is a part of a larger array, as a layer's is, would be copied before a kernel
    takes it, by a program of its own; what all kernels of a layer take is packed by one.

    Attributes:
      values: Float32, all vectors; no gradient flows through it.
      starts: A pytree of static integers: where each vector begins.
    """

    values: Array
    starts: Any = struct.field(pytree_node=False)

    @classmethod
    def of(cls, vectors: Any) -> Self:
        """Packs a pytree of arrays, each raveled."""
        leaves, structure = jax.tree.flatten(jax.lax.stop_gradient(vectors))
        ends = itertools.accumulate((leaf.size for leaf in leaves), initial=0)
        values = jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in leaves])
        return cls(values, jax.tree.unflatten(structure, list(ends)[:-1]))

    def map(self, function: Callable[[Any], Any]) -> Self:
        """The same vectors, and a function of where they begin, such as a part of a tree."""
        return type(self)(self.values, function(self.starts))


def applies() -> bool:
    """Whether the kernels are used where they fit: on GPUs."""
    return jax.default_backend() == "gpu"


def interpreted() -> bool:
    """Whether kernels, if used at all, run in Pallas's interpreter."""
    return jax.default_backend() != "gpu"


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def span(start: Any, count: int) -> Array:
    """The int32 numbers ``[count]`` from ``start`` on."""
    return start + jnp.arange(count, dtype=jnp.int32)


def load_block(ref: Any, rows: Array, columns: Array, inside: Array | None) -> Array:
    """Loads ``[rows, columns]`` of a matrix; zeros where ``inside``, of that shape, is False."""
    row, column = _grid(rows, columns)
    if inside is None:
        return triton.load(ref.at[row, column])
    row, column = (jnp.where(inside, index, 0) for index in (row, column))
    return triton.load(ref.at[row, column], mask=inside, other=jnp.zeros((), ref.dtype))


def load_span(ref: Any, index: Array, inside: Array | None) -> Array:
    """Loads entries of a vector; zeros where ``inside`` is False."""
    if inside is None:
        return triton.load(ref.at[index])
    index = jnp.where(inside, index, 0)
    return triton.load(ref.at[index], mask=inside, other=jnp.zeros((), ref.dtype))


def store_block(ref: Any, rows: Array, columns: Array, inside: Array | None, values: Array) -> None:
    """Stores ``[rows, columns]`` of a matrix, where ``inside``."""
    row, column = _grid(rows, columns)
    values = values.astype(ref.dtype)
    if inside is None:
        triton.store(ref.at[row, column], values)
        return
    # Beyond the end, not at an entry that another program writes: the interpreter scatters all.
    row = jnp.where(inside, row, ref.shape[0])
    triton.store(ref.at[row, column], values, mask=inside)


def column_of(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeats a vector along the columns of a matrix."""
    return jnp.broadcast_to(values[:, None], shape)


def row_of(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeats a vector along the rows of a matrix."""
    return jnp.broadcast_to(values[None], shape)


def _grid(rows: Array, columns: Array) -> tuple[Array, Array]:
    shape = rows.size, columns.size
    return column_of(rows, shape), row_of(columns, shape)


def dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """A float32 matrix product over one axis of each; exact products of float32 values."""
    exact = left.dtype == jnp.float32
    return jax.lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
