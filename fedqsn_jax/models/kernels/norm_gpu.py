"""The end of a residual branch for NVIDIA GPUs, in Pallas for the Triton compiler.

A bias, dropout, the sum with the residual stream and its layer norm are one pass over memory, and
so are all their gradients: the sums over tokens, of which biases' and scales' gradients consist,
are taken where the values are in registers anyway. The width is loaded in pieces of a power of two
that fill it, as padding it to the next one would leave a quarter of the threads idle at 768.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.dropout import is_kept, kept_scale, streams_of
from fedqsn_jax.models.kernels.gpu_blocks import (
    Packed,
    column_of,
    load_block,
    load_span,
    power_of_two,
    row_of,
    span,
    store_block,
)
from fedqsn_jax.models.kernels.triton_backend import pallas as pl
from fedqsn_jax.models.kernels.triton_backend import triton

_WIDEST = 2048
_MOST_PIECES = 8
# Measured on an H200 with 8192 tokens of 768 entries.
_FORWARD_TOKENS = 16
_BACKWARD_TOKENS = 2
_ENTRIES_OF_WARP = 768
_BACKWARD_PROGRAMS = 512
_Entry = TypeVar("_Entry")


@dataclasses.dataclass(frozen=True)
class Branch:
    """What is static of a branch's end.

    Attributes:
      epsilon: Of the layer norm.
      rate: Dropout rate of the branch; 0: none.
    """

    epsilon: float
    rate: float


class Vectors(NamedTuple, Generic[_Entry]):
    """What is learned of a branch's end: vectors, float32 ``[width]``, or where they begin.

    Attributes:
      bias: Of the branch's last product.
      scale: Of the norm.
      offset: Of the norm.
    """

    bias: _Entry
    scale: _Entry
    offset: _Entry


def fits(width: int, dtype: Any) -> bool:
    """Whether the kernels here do a norm over so many entries."""
    few = width // _piece(width) <= _MOST_PIECES
    return width <= _WIDEST and few and width % 8 == 0 and jnp.dtype(dtype) == jnp.bfloat16


def _piece(width: int) -> int:
    """The largest power of two that divides the width."""
    return width & -width


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def add_and_norm(
    branch: Branch,
    interpret: bool,
    hidden: Array,
    change: Array,
    vectors: Vectors[Array],
    packed: Packed,
    words: Array,
) -> tuple[Array, Array]:
    """The layer norm of ``hidden + dropout(change + bias)``, twice.

    It has two uses, as residual stream and as input of the next branch. With one copy for each the
    kernel of the gradient adds the cotangents while it loads them.

    Args:
      branch: Settings.
      interpret: Run without a GPU, slowly.
      hidden: ``[rows, length, width]``.
      change: The same shape and type.
      vectors: Bias, scale and offset, which gradients are with respect to.
      packed: Where their values are read, with starts in `Vectors`.
      words: uint32 ``[2]``, `dropout.words_of` the key of the dropout, which drops what
        `dropout.drop` drops of ``change``.
    """
    return _add_and_norm_forward(branch, interpret, hidden, change, vectors, packed, words)[0]


def _add_and_norm_forward(branch, interpret, hidden, change, vectors, packed, words):
    del vectors
    shape = _Shape(hidden.shape, _FORWARD_TOKENS)
    flat = jax.ShapeDtypeStruct((shape.tokens, shape.width), hidden.dtype)
    normed, total = pl.pallas_call(
        functools.partial(_forward_kernel, branch, shape, packed.starts),
        (flat, flat),
        grid=(shape.blocks,),
        interpret=interpret,
        compiler_params=shape.compiler_params,
        name="add_and_norm",
    )(
        shape.flat(hidden),
        shape.flat(change),
        packed.values,
        *_streams(branch, words, hidden.shape),
    )
    normed = normed.reshape(hidden.shape)
    return (normed, normed), (total, packed, words)


def _add_and_norm_backward(branch, interpret, residuals, cotangents):
    total, packed, words = residuals
    shape = _Shape(cotangents[0].shape, _BACKWARD_TOKENS)
    flat = jax.ShapeDtypeStruct(total.shape, total.dtype)
    programs = min(_BACKWARD_PROGRAMS, shape.blocks)
    *gradients, sums = pl.pallas_call(
        functools.partial(_backward_kernel, branch, shape, packed.starts, programs),
        (
            *((flat, flat) if branch.rate else (flat,)),
            jax.ShapeDtypeStruct((3 * programs, shape.width), jnp.float32),
        ),
        grid=(programs,),
        interpret=interpret,
        compiler_params=shape.compiler_params,
        name="add_and_norm_gradient",
    )(
        total,
        *map(shape.flat, cotangents),
        packed.values,
        *_streams(branch, words, cotangents[0].shape),
    )
    to_hidden, to_change = gradients[0], gradients[-1]
    to_vectors = sums.reshape(3, programs, shape.width).sum(axis=1)
    return (
        to_hidden.reshape(cotangents[0].shape),
        to_change.reshape(cotangents[0].shape),
        Vectors(*to_vectors),
        None,
        None,
    )


add_and_norm.defvjp(_add_and_norm_forward, _add_and_norm_backward)


def _streams(branch: Branch, words: Array, shape: tuple[int, ...]) -> list[Array]:
    """With dropout, where the hash of each token's entries begins."""
    return [streams_of(words, shape[:-1]).reshape(-1)] if branch.rate else []


class _Shape:
    """Of the activations, and of the blocks of it that a program takes."""

    def __init__(self, shape: tuple[int, ...], block: int) -> None:
        rows, length, self.width = shape
        self.tokens, self.block = rows * length, block
        self.blocks = -(-self.tokens // block)
        self.piece = _piece(self.width)
        self.pieces = self.width // self.piece

    @property
    def compiler_params(self) -> Any:
        warps = self.block * -(-self.width // _ENTRIES_OF_WARP)
        return triton.CompilerParams(num_warps=min(power_of_two(warps), 16), num_stages=1)

    def flat(self, values: Array) -> Array:
        return values.reshape(self.tokens, self.width)

    def columns(self) -> list[Array]:
        """Of each piece."""
        return [span(each * self.piece, self.piece) for each in range(self.pieces)]

    def vector(self, ref: Any, start: int) -> list[Array]:
        """Pieces of a packed vector."""
        return [load_span(ref, start + each, None) for each in self.columns()]


class _Block:
    """Some tokens, as a program loads them: values are lists, with ``[tokens, piece]`` of each."""

    def __init__(self, branch: Branch, shape: _Shape, first: Any) -> None:
        self.branch, self.shape = branch, shape
        self.tokens, self.columns = span(first, shape.block), shape.columns()
        self.size = shape.block, shape.piece
        whole = shape.tokens % (_BACKWARD_TOKENS * _BACKWARD_PROGRAMS) == 0
        self.exist = None if whole else self.tokens < shape.tokens
        self.inside = None if self.exist is None else column_of(self.exist, self.size)

    def load(self, ref: Any) -> list[Array]:
        """Float32 values of the tokens."""
        return [
            load_block(ref, self.tokens, columns, self.inside).astype(jnp.float32)
            for columns in self.columns
        ]

    def store(self, ref: Any, values: list[Array]) -> None:
        for columns, each in zip(self.columns, values, strict=True):
            store_block(ref, self.tokens, columns, self.inside, each)

    def vector(self, ref: Any, start: int) -> list[Array]:
        """A packed vector, repeated for all tokens."""
        return self.repeat_rows(self.shape.vector(ref, start))

    def repeat_rows(self, vector: list[Array]) -> list[Array]:
        """A vector's pieces, for all tokens."""
        return _each(lambda piece: row_of(piece, self.size), vector)

    def repeat(self, values: Array) -> Array:
        """What is one number a token, for all entries of a piece."""
        return column_of(values, self.size)

    def mean(self, values: list[Array]) -> Array:
        """Over the width, repeated."""
        total = functools.reduce(jnp.add, (each.sum(axis=1) for each in values))
        return self.repeat(total / self.shape.width)

    def normed(self, values: list[Array]) -> tuple[list[Array], Array]:
        """Values with mean zero and variance one, and what they were multiplied by."""
        mean = self.mean(values)
        centred = _each(lambda x: x - mean, values)
        inverse = jax.lax.rsqrt(self.mean(_each(jnp.square, centred)) + self.branch.epsilon)
        return _each(lambda x: x * inverse, centred), inverse

    def drop(self, streams: tuple[Any, ...], values: list[Array]) -> list[Array]:
        """Drops entries: the same ones each time."""
        if not streams:
            return values
        stream = self.repeat(load_span(streams[0], self.tokens, self.exist))
        rate = self.branch.rate
        scale = kept_scale(rate)

        def dropped(columns: Array, each: Array) -> Array:
            kept = is_kept(stream, row_of(columns.astype(jnp.uint32), self.size), rate)
            return jnp.where(kept, each * scale, 0)

        return _each(dropped, self.columns, values)


def _forward_kernel(
    branch: Branch,
    shape: _Shape,
    starts: Vectors[int],
    hidden: Any,
    change: Any,
    packed: Any,
    *rest: Any,
) -> None:
    *streams, normed, total = rest
    block = _Block(branch, shape, pl.program_id(0) * shape.block)
    changed = _each(jnp.add, block.load(change), block.vector(packed, starts.bias))
    changed = block.drop(tuple(streams), changed)
    # Rounded as it is kept: the backward pass takes the same norm again.
    values = _each(lambda x, y: (x + y).astype(total.dtype), block.load(hidden), changed)
    block.store(total, values)
    values, _ = block.normed(_each(lambda x: x.astype(jnp.float32), values))
    scale, offset = block.vector(packed, starts.scale), block.vector(packed, starts.offset)
    block.store(normed, _each(lambda x, factor, more: x * factor + more, values, scale, offset))


def _backward_kernel(
    branch: Branch,
    shape: _Shape,
    starts: Vectors[int],
    programs: int,
    total: Any,
    cotangent: Any,
    other_cotangent: Any,
    packed: Any,
    *rest: Any,
) -> None:
    streams = rest[:1] if branch.rate else ()
    to_hidden, *to_change, sums_ref = rest[len(streams) :]
    program = pl.program_id(0)
    steps = -(-shape.blocks // programs)
    scale = shape.vector(packed, starts.scale)

    def add_tokens(step: Any, sums: list[list[Array]]) -> list[list[Array]]:
        block = _Block(branch, shape, (program * steps + step) * shape.block)
        values, inverse = block.normed(block.load(total))
        flowing = _each(jnp.add, block.load(cotangent), block.load(other_cotangent))
        scaled = _each(jnp.multiply, flowing, block.repeat_rows(scale))
        mean = block.mean(scaled)
        along = block.mean(_each(jnp.multiply, scaled, values))
        gradient = _each(lambda x, value: (x - mean - value * along) * inverse, scaled, values)
        block.store(to_hidden, gradient)
        dropped = block.drop(streams, gradient)
        if to_change:
            block.store(to_change[0], dropped)
        inside = block.inside
        if inside is not None:
            dropped = _each(lambda x: jnp.where(inside, x, 0), dropped)
        to_scale = _each(jnp.multiply, flowing, values)
        return jax.tree.map(jnp.add, sums, [dropped, to_scale, flowing])

    zeros = [jnp.zeros((shape.block, shape.piece), jnp.float32)] * shape.pieces
    sums = jax.lax.fori_loop(0, steps, add_tokens, [zeros] * 3)
    for which, pieces in enumerate(sums):
        row = jnp.full((1,), which * programs, jnp.int32) + program
        for columns, values in zip(shape.columns(), pieces, strict=True):
            store_block(sums_ref, row, columns, None, values.sum(axis=0)[None])


def _each(function: Callable[..., Array], *values: list[Array]) -> list[Array]:
    """Applies a function to every piece."""
    return [function(*pieces) for pieces in zip(*values, strict=True)]
