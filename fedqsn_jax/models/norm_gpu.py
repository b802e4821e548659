"""The end of a residual branch for NVIDIA GPUs, in Pallas for the Triton compiler.

A bias, dropout, the sum with the residual stream and its layer norm are one pass over memory, and
so are all their gradients: the sums over tokens, of which biases' and scales' gradients consist,
are taken where the values are in registers anyway.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fedqsn_jax.models.dropout import is_kept, kept_scale, streams_of
from fedqsn_jax.models.gpu_blocks import (
    column_of,
    load_block,
    load_span,
    power_of_two,
    row_of,
    span,
    store_block,
)
from fedqsn_jax.types import Array

_WIDEST = 2048
# Measured on an H200 with 8192 tokens of 768 entries.
_TOKENS = 2
_WARPS = 4
_BACKWARD_PROGRAMS = 512


@dataclasses.dataclass(frozen=True)
class Branch:
    """What is static of a branch's end.

    Attributes:
      epsilon: Of the layer norm.
      rate: Dropout rate of the branch; 0: none.
    """

    epsilon: float
    rate: float


def fits(width: int, dtype: Any) -> bool:
    """Whether the kernels here do a norm over so many entries."""
    return width <= _WIDEST and width % 8 == 0 and jnp.dtype(dtype) == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def add_and_norm(
    branch: Branch,
    interpret: bool,
    hidden: Array,
    change: Array,
    bias: Array,
    scale: Array,
    offset: Array,
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
      bias: Float32 ``[width]``.
      scale: Of the norm, float32 ``[width]``.
      offset: Of the norm, float32 ``[width]``.
      words: uint32 ``[2]``, `dropout.words_of` the key of the dropout, which drops what
        `dropout.drop` drops of ``change``.
    """
    return _add_and_norm_forward(branch, interpret, hidden, change, bias, scale, offset, words)[0]


def _add_and_norm_forward(branch, interpret, hidden, change, bias, scale, offset, words):
    shape = _Shape(hidden.shape)
    flat = jax.ShapeDtypeStruct((shape.tokens, shape.width), hidden.dtype)
    operands = [shape.flat(hidden), shape.flat(change), bias, scale, offset]
    normed, total = pl.pallas_call(
        functools.partial(_forward_kernel, branch, shape),
        (flat, flat),
        grid=(-(-shape.tokens // _TOKENS),),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="add_and_norm",
    )(*operands, *_streams(branch, words, hidden.shape))
    normed = normed.reshape(hidden.shape)
    return (normed, normed), (total, bias, scale, offset, words)


def _add_and_norm_backward(branch, interpret, residuals, cotangents):
    total, bias, scale, offset, words = residuals
    shape = _Shape(cotangents[0].shape)
    flat = jax.ShapeDtypeStruct(total.shape, total.dtype)
    programs = min(_BACKWARD_PROGRAMS, -(-shape.tokens // _TOKENS))
    *gradients, sums = pl.pallas_call(
        functools.partial(_backward_kernel, branch, shape, programs),
        (
            *((flat, flat) if branch.rate else (flat,)),
            jax.ShapeDtypeStruct((3 * programs, shape.width), jnp.float32),
        ),
        grid=(programs,),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="add_and_norm_gradient",
    )(
        total,
        *map(shape.flat, cotangents),
        scale,
        *_streams(branch, words, cotangents[0].shape),
    )
    to_hidden, to_change = gradients[0], gradients[-1]
    to_bias, to_scale, to_offset = sums.reshape(3, programs, shape.width).sum(axis=1)
    return (
        to_hidden.reshape(cotangents[0].shape),
        to_change.reshape(cotangents[0].shape),
        to_bias.astype(bias.dtype),
        to_scale.astype(scale.dtype),
        to_offset.astype(offset.dtype),
        None,
    )


add_and_norm.defvjp(_add_and_norm_forward, _add_and_norm_backward)


def _streams(branch: Branch, words: Array, shape: tuple[int, ...]) -> list[Array]:
    """With dropout, where the hash of each token's entries begins."""
    return [streams_of(words, shape[:-1]).reshape(-1)] if branch.rate else []


class _Shape:
    """Of the activations, and of the blocks of it that a program takes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        rows, self.length, self.width = shape
        self.tokens = rows * self.length
        self.block = _TOKENS, power_of_two(self.width)

    def flat(self, values: Array) -> Array:
        return values.reshape(self.tokens, self.width)


class _Block:
    """Some tokens, as a program loads them."""

    def __init__(self, branch: Branch, shape: _Shape, first: Any) -> None:
        self.branch, self.shape = branch, shape
        self.tokens, self.columns = span(first, shape.block[0]), span(0, shape.block[1])
        self.real = None if shape.width == shape.block[1] else self.columns < shape.width
        whole = self.real is None and shape.tokens % (_TOKENS * _BACKWARD_PROGRAMS) == 0
        inside = column_of(self.tokens < shape.tokens, shape.block)
        if self.real is not None:
            inside &= row_of(self.real, shape.block)
        self.inside = None if whole else inside

    def load(self, ref: Any) -> Array:
        """Float32 values of the tokens."""
        return load_block(ref, self.tokens, self.columns, self.inside).astype(jnp.float32)

    def store(self, ref: Any, values: Array) -> None:
        store_block(ref, self.tokens, self.columns, self.inside, values)

    def vector(self, ref: Any) -> Array:
        """What is the same for all tokens, repeated."""
        values = load_span(ref, self.columns, self.real).astype(jnp.float32)
        return row_of(values, self.shape.block)

    def mean(self, values: Array) -> Array:
        """Over the width, repeated; values outside must be zero."""
        return column_of(values.sum(axis=1) / self.shape.width, self.shape.block)

    def normed(self, values: Array) -> tuple[Array, Array]:
        """Values with mean zero and variance one, zero outside, and what they were divided by."""
        centred = values - self.mean(values)
        if self.real is not None:
            centred = jnp.where(row_of(self.real, self.shape.block), centred, 0)
        inverse = jax.lax.rsqrt(self.mean(centred * centred) + self.branch.epsilon)
        return centred * inverse, inverse

    def drop(self, streams: tuple[Any, ...], values: Array) -> Array:
        """Drops entries: the same ones each time."""
        if not streams:
            return values
        exist = None if self.inside is None else self.tokens < self.shape.tokens
        stream = column_of(load_span(streams[0], self.tokens, exist), values.shape)
        columns = row_of(self.columns.astype(jnp.uint32), values.shape)
        kept = is_kept(stream, columns, self.branch.rate)
        return jnp.where(kept, values * kept_scale(self.branch.rate), 0)


def _forward_kernel(
    branch: Branch,
    shape: _Shape,
    hidden: Any,
    change: Any,
    bias: Any,
    scale: Any,
    offset: Any,
    *rest: Any,
) -> None:
    *streams, normed, total = rest
    block = _Block(branch, shape, pl.program_id(0) * _TOKENS)
    changed = block.load(change) + block.vector(bias)
    # Rounded as it is kept: the backward pass takes the same norm again.
    values = (block.load(hidden) + block.drop(tuple(streams), changed)).astype(total.dtype)
    block.store(total, values)
    values, _ = block.normed(values.astype(jnp.float32))
    block.store(normed, values * block.vector(scale) + block.vector(offset))


def _backward_kernel(
    branch: Branch,
    shape: _Shape,
    programs: int,
    total: Any,
    cotangent: Any,
    other_cotangent: Any,
    scale: Any,
    *rest: Any,
) -> None:
    streams = rest[:1] if branch.rate else ()
    to_hidden, *to_change, sums_ref = rest[len(streams) :]
    program = pl.program_id(0)
    steps = -(-shape.tokens // (_TOKENS * programs))

    def add_tokens(step: Any, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block = _Block(branch, shape, (program * steps + step) * _TOKENS)
        values, inverse = block.normed(block.load(total))
        flowing = block.load(cotangent) + block.load(other_cotangent)
        scaled = flowing * block.vector(scale)
        gradient = scaled - block.mean(scaled) - values * block.mean(scaled * values)
        gradient *= inverse
        block.store(to_hidden, gradient)
        dropped = block.drop(streams, gradient)
        if to_change:
            block.store(to_change[0], dropped)
        bias_sum, scale_sum, offset_sum = sums
        if block.inside is not None:
            dropped = jnp.where(block.inside, dropped, 0)
        return bias_sum + dropped, scale_sum + flowing * values, offset_sum + flowing

    zeros = jnp.zeros(shape.block, jnp.float32)
    sums = jax.lax.fori_loop(0, steps, add_tokens, (zeros, zeros, zeros))
    columns = span(0, shape.block[1])
    inside = None if shape.width == shape.block[1] else (columns < shape.width)[None]
    for index, values in enumerate(sums):
        row = jnp.full((1,), index * programs, jnp.int32) + program
        store_block(sums_ref, row, columns, inside, values.sum(axis=0)[None])
