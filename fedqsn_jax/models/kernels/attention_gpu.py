"""Attention over short sequences for NVIDIA GPUs, in Pallas for the Triton compiler.

One program holds a head of one row whole: its scores never leave the registers, so nothing is kept
between the passes but what came in, and softmax needs no running maximum. Query, key and value lie
side by side, as one matrix product of the hidden states makes them, and so do their cotangents;
biases are added on the way in, and their gradients summed on the way out.
"""

import dataclasses
import functools
import math
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.dropout import fold, is_kept, kept_scale, stream_of
from fedqsn_jax.models.kernels.gpu_blocks import (
    Packed,
    column_of,
    dot,
    load_block,
    load_span,
    power_of_two,
    row_of,
    span,
    store_block,
)
from fedqsn_jax.models.kernels.triton_backend import pallas as pl
from fedqsn_jax.models.kernels.triton_backend import triton

_LONGEST = 128
_HEAD_SIZES = (32, 64)
_LOG2_E = math.log2(math.e)
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_WARPS = 8
_Entry = TypeVar("_Entry")


@dataclasses.dataclass(frozen=True)
class Heads:
    """What is static of an attention.

    Attributes:
      count: Number of heads.
      size: Width of a head.
      scale: What products of queries and keys are multiplied by.
      causal: Whether query i sees keys up to i only.
      rate: Dropout rate of the probabilities; 0: none.
    """

    count: int
    size: int
    scale: float
    causal: bool
    rate: float


class Biases(NamedTuple, Generic[_Entry]):
    """Of the three products: vectors, float32 ``[heads * size]``, or where they begin."""

    query: _Entry
    key: _Entry
    value: _Entry


def fits(length: int, size: int, dtype: Any) -> bool:
    """Whether the kernels here attend over sequences and heads of such sizes."""
    return 16 <= length <= _LONGEST and size in _HEAD_SIZES and jnp.dtype(dtype) == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def self_attention(
    heads: Heads,
    interpret: bool,
    product: Array,
    biases: Biases[Array],
    packed: Packed,
    seen: Array,
    words: Array,
) -> Array:
    """Scaled dot-product attention of a sequence to itself.

    Args:
      heads: Numbers and settings.
      interpret: Run without a GPU, slowly.
      product: Query, key and value without biases, ``[rows, length, 3 * heads * size]``.
      biases: What is added to them, which gradients are with respect to.
      packed: Where their values are read, with starts in `Biases`.
      seen: int32 ``[rows, length]``, not zero where a token may be attended to.
      words: uint32 ``[2]``, `dropout.words_of` the key of the dropout, which drops what
        `dropout.drop` drops of probabilities ``[rows, heads, queries, keys]``.

    Returns:
      ``[rows, length, heads * size]``.
    """
    del biases
    rows, length, _ = product.shape
    width = heads.count * heads.size
    attended = pl.pallas_call(
        functools.partial(_forward_kernel, heads, length, packed.starts),
        jax.ShapeDtypeStruct((rows * length, width), product.dtype),
        grid=(rows, heads.count),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="attention",
    )(_flat(product), packed.values, seen, words)
    return attended.reshape(rows, length, width)


def _attend_forward(heads, interpret, product, biases, packed, seen, words):
    attended = self_attention(heads, interpret, product, biases, packed, seen, words)
    return attended, (product, packed, seen, words)


def _attend_backward(heads, interpret, residuals, cotangent):
    product, packed, seen, words = residuals
    rows, length, columns = product.shape
    gradient, sums = pl.pallas_call(
        functools.partial(_backward_kernel, heads, length, packed.starts),
        (
            jax.ShapeDtypeStruct((rows * length, columns), product.dtype),
            jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        ),
        grid=(rows, heads.count),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="attention_gradient",
    )(_flat(product), packed.values, seen, words, _flat(cotangent))
    to_biases = Biases(*jnp.split(sums.sum(axis=0), 3))
    return gradient.reshape(product.shape), to_biases, None, None, None


self_attention.defvjp(_attend_forward, _attend_backward)


def _flat(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


class _Head:
    """One head of one row, as a program loads it."""

    def __init__(
        self,
        heads: Heads,
        length: int,
        starts: Biases[int],
        product: Any,
        packed: Any,
        seen: Any,
        words: Any,
    ) -> None:
        self.heads, self.padded = heads, power_of_two(length)
        self.row, self.head = pl.program_id(0), pl.program_id(1)
        self.positions = span(0, self.padded)
        self.tokens = self.row * length + self.positions
        exists = None if self.padded == length else self.positions < length
        self.exists = exists
        shape = self.padded, heads.size
        self.inside = None if exists is None else column_of(exists, shape)
        self.query, self.key, self.value = (
            self._load(product, part, packed, start) for part, start in enumerate(starts)
        )
        rows = jnp.full_like(self.positions, self.row)
        visible = triton.load(
            seen.at[
                rows, self.positions if exists is None else jnp.where(exists, self.positions, 0)
            ]
        )
        self.visible = visible != 0
        self.words = (words[0], words[1]) if heads.rate else None

    def columns(self, part: int = 0) -> Array:
        """This head's in a product: of the query (0), the key (1) or the value (2).

        Those of the query are also what it has of biases and of what was attended.
        """
        heads = self.heads
        return (part * heads.count + self.head) * heads.size + span(0, heads.size)

    def _load(self, product: Any, part: int, packed: Any, start: int) -> Array:
        values = load_block(product, self.tokens, self.columns(part), self.inside)
        values = values.astype(jnp.float32)
        values += row_of(load_span(packed, start + self.columns(), None), values.shape)
        if self.inside is not None:
            values = jnp.where(self.inside, values, 0)
        return values.astype(product.dtype)

    def probabilities(self) -> tuple[Array, Array]:
        """Float32 ``[queries, keys]`` without dropout, and which queries see anything."""
        products = dot(self.query, self.key, (1, 1))
        visible = row_of(self.visible, products.shape)
        if self.heads.causal:
            queries = column_of(self.positions, products.shape)
            visible &= queries >= row_of(self.positions, products.shape)
        # Powers of two are what the hardware has.
        products = jnp.where(visible, products * (self.heads.scale * _LOG2_E), _MASKED)
        largest = products.max(axis=1)
        powers = jnp.exp2(products - column_of(largest, products.shape))
        if self.exists is not None:
            powers = jnp.where(row_of(self.exists, products.shape), powers, 0)
        shares = powers * column_of(1 / powers.sum(axis=1), products.shape)
        return shares, largest > 0.5 * _MASKED

    def drop(self, values: Array) -> Array:
        """Zeroes entries of ``[queries, keys]``, the same ones each time; scales none."""
        if self.words is None:
            return values
        stream = stream_of(self.words)
        stream = fold(self.words, stream, self.row.astype(jnp.uint32))
        stream = fold(self.words, stream, self.head.astype(jnp.uint32))
        positions = self.positions.astype(jnp.uint32)
        streams = fold(self.words, jnp.full_like(positions, stream), positions)
        kept = is_kept(
            column_of(streams, values.shape), row_of(positions, values.shape), self.heads.rate
        )
        return jnp.where(kept, values, 0)


def _forward_kernel(heads: Heads, length: int, starts: Biases[int], *refs: Any) -> None:
    *inputs, attended = refs
    head = _Head(heads, length, starts, *inputs)
    weights = head.drop(head.probabilities()[0]).astype(head.value.dtype)
    values = dot(weights, head.value, (1, 0)) * kept_scale(heads.rate)
    store_block(attended, head.tokens, head.columns(), head.inside, values)


def _backward_kernel(heads: Heads, length: int, starts: Biases[int], *refs: Any) -> None:
    *inputs, cotangent, gradient, sums = refs
    head = _Head(heads, length, starts, *inputs)
    flowing = load_block(cotangent, head.tokens, head.columns(), head.inside)
    probabilities, sees = head.probabilities()
    # What the kept are multiplied by, and the scale, wait for the smaller matrices.
    scale = kept_scale(heads.rate)
    to_value = dot(head.drop(probabilities).astype(flowing.dtype), flowing, (0, 0)) * scale
    # Kept in half the registers, so that more programs run side by side.
    probabilities = probabilities.astype(flowing.dtype)
    to_weights = head.drop(dot(flowing, head.value, (1, 1)))
    weighted = probabilities.astype(jnp.float32) * to_weights
    mean = column_of(weighted.sum(axis=1), weighted.shape)
    to_products = (weighted - probabilities.astype(jnp.float32) * mean).astype(flowing.dtype)
    # Where a query sees nothing, probabilities are not zero, but no gradient flows.
    flows = column_of(sees, head.query.shape)
    scale *= heads.scale
    to_query = jnp.where(flows, dot(to_products, head.key, (1, 0)) * scale, 0)
    query = jnp.where(flows, head.query, jnp.zeros_like(head.query))
    to_key = dot(to_products, query, (0, 0)) * scale
    rows = jnp.full((heads.size,), head.row, jnp.int32)
    for part, values in enumerate((to_query, to_key, to_value)):
        store_block(gradient, head.tokens, head.columns(part), head.inside, values)
        triton.store(sums.at[rows, head.columns(part)], values.sum(axis=0))
