"""What the Pallas kernels for NVIDIA GPUs share: loading and storing blocks of matrices.

Triton's blocks have sizes that are powers of two; what sticks out of a matrix is masked.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels import triton_backend
from fedqsn_jax.models.kernels.triton_backend import triton

_AMPERE = (8, 0)


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


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Arithmetic of float32 arrays of one shape, an instruction an operation.

    Pallas's own operations never become fused multiply-adds, divide nearly exactly, and take powers
    with care for subnormal numbers: several instructions each. Kernels that are bound by the number
    of their instructions, not by memory, say here what they need. Bounds are from the PTX ISA.

    Attributes:
      interpret: Whether the kernel is interpreted; then the operations are JAX's.
    """

    interpret: bool

    def multiply_add(self, one: Array, other: Array | float, addend: Array | float) -> Array:
        """``one * other + addend``; on a GPU rounded once. The last two may be numbers."""
        if self.interpret:
            return one * other + addend
        return self._instruction("fma.rn", one, other, addend)

    def reciprocal(self, values: Array) -> Array:
        """``1 / values``; on a GPU off by a unit in the last place at most."""
        return 1 / values if self.interpret else self._instruction("rcp.approx.ftz", values)

    def exp2(self, exponents: Array) -> Array:
        """``2**exponents``; on a GPU off by 2**-22 of it at most, and zero below 2**-126."""
        if self.interpret:
            return jnp.exp2(exponents)
        return self._instruction("ex2.approx.ftz", exponents)

    def _instruction(self, name: str, first: Array, *others: Array | float) -> Array:
        # Whole numbers, too, have to be float32: an instruction takes bits as they are.
        numbers = [jnp.asarray(each, jnp.float32) for each in (first, *others)]
        arguments = [jnp.broadcast_to(each, first.shape) for each in numbers]
        operands = ", ".join(f"${place}" for place in range(len(arguments) + 1))
        return triton.elementwise_inline_asm(
            f"{name}.f32 {operands};",
            args=arguments,
            constraints=",".join(["=f"] + ["f"] * len(arguments)),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(first.shape, jnp.float32)],
        )[0]


def applies() -> bool:
    """Whether the kernels are used where they fit: on NVIDIA GPUs, from Ampere on.

    Not where this JAX has no Triton backend any more.
    """
    # Apart from it, as tests set this where there is no GPU: cuDNN's attention would not run there.
    return knows_bfloat16() and triton_backend.exists()


def missing_note() -> tuple[str, ...]:
    """Returns a line for the user where the kernels would be used, if this JAX had Triton."""
    if not knows_bfloat16() or triton_backend.exists():
        return ()
    return (
        "this JAX has no Triton backend of Pallas, in which kernels for this GPU are written: "
        "models compute by plain JAX, which is slower",
    )


def knows_bfloat16() -> bool:
    """Whether this is an NVIDIA GPU with bfloat16, which cuDNN's attention needs."""
    capability = _capability()
    return capability is not None and capability >= _AMPERE


def lacks_triton() -> bool:
    """Whether JAX has no Triton backend, or this is an NVIDIA GPU that Triton does not support."""
    capability = _capability()
    return not triton_backend.exists() or (capability is not None and capability < _AMPERE)


def _capability() -> tuple[int, ...] | None:
    """The compute capability of an NVIDIA GPU; None for any other device."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices()[0]
    # JAX says "gpu" of AMD's too.
    if "cuda" not in device.client.platform_version:
        return None
    return tuple(int(part) for part in device.compute_capability.split("."))


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
    row, column = grid_of(rows, columns)
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
    row, column = grid_of(rows, columns)
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


def grid_of(rows: Array, columns: Array) -> tuple[Array, Array]:
    """Indices ``[rows, columns]`` of a block."""
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
