"""GELU of a biased product for NVIDIA GPUs, in Pallas for the Triton compiler.

The exact GELU is bound by arithmetic when the error function is computed to the last bit and its
derivative's exponential beside it. Here both come from one exponential, to 2e-7. The forward pass
keeps the derivative in place of what it is the derivative at, so that the backward pass is bound by
memory alone; it sums the gradient of the bias on the way.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fedqsn_jax.models.gpu_blocks import (
    Packed,
    column_of,
    load_block,
    load_span,
    row_of,
    span,
    store_block,
)
from fedqsn_jax.types import Array

# Tokens and columns of a program; measured on an H200 with 8192 tokens of 3072 columns.
_FORWARD_BLOCK = 4, 1024
_BACKWARD_BLOCK = 8, 256
_LEAST_COLUMNS = 128
_WARPS = 4
_SPLITS = 64
# Of the error function's approximation 7.1.26 in Abramowitz and Stegun, halved.
_POLYNOMIAL = tuple(
    0.5 * each for each in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)
_POLE = 0.3275911 * math.sqrt(0.5)
_LOG2_E = math.log2(math.e)


def fits(columns: int, dtype: Any) -> bool:
    """Whether the kernels here do products of so many columns."""
    return columns % _LEAST_COLUMNS == 0 and jnp.dtype(dtype) == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def biased_gelu(interpret: bool, product: Array, bias: Array, packed: Packed) -> Array:
    """``gelu(product + bias)``, the exact one.

    Args:
      interpret: Run without a GPU, slowly.
      product: ``[..., columns]``.
      bias: Float32 ``[columns]``, which gradients are with respect to.
      packed: Where its values are read, from the start on.

    Returns:
      The same shape and type as the product.
    """
    del bias
    return _applied(interpret, product, packed, keeps_slope=False)[0]


def _biased_gelu_forward(interpret, product, bias, packed):
    del bias
    outputs, slope = _applied(interpret, product, packed, keeps_slope=True)
    return outputs, slope


def _biased_gelu_backward(interpret, slope, cotangent):
    flat = _flat(slope)
    tokens, columns = flat.shape
    block = _BACKWARD_BLOCK[0], math.gcd(columns, _BACKWARD_BLOCK[1])
    splits = min(_SPLITS, -(-tokens // block[0]))
    gradient, sums = pl.pallas_call(
        functools.partial(_backward_kernel, tokens, block, splits),
        (
            jax.ShapeDtypeStruct(flat.shape, flat.dtype),
            jax.ShapeDtypeStruct((splits, columns), jnp.float32),
        ),
        grid=(splits, columns // block[1]),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="biased_gelu_gradient",
    )(flat, _flat(cotangent))
    return gradient.reshape(cotangent.shape), sums.sum(axis=0), None


biased_gelu.defvjp(_biased_gelu_forward, _biased_gelu_backward)


def _applied(interpret: bool, product: Array, packed: Packed, keeps_slope: bool) -> list[Array]:
    """The GELU and, if wanted, its derivative."""
    flat = _flat(product)
    tokens, columns = flat.shape
    block = _FORWARD_BLOCK[0], math.gcd(columns, _FORWARD_BLOCK[1])
    shape = jax.ShapeDtypeStruct(flat.shape, flat.dtype)
    results = pl.pallas_call(
        functools.partial(_forward_kernel, tokens, block, packed.starts),
        (shape, shape) if keeps_slope else (shape,),
        grid=(-(-tokens // block[0]), columns // block[1]),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="biased_gelu",
    )(flat, packed.values)
    return [each.reshape(product.shape) for each in results]


def _flat(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def _distribution(values: Array) -> tuple[Array, Array]:
    """The normal distribution function and ``exp(-x**2 / 2)``, of float32 values."""
    size = jnp.abs(values)
    # Powers of two are what the hardware has.
    power = jnp.exp2((-0.5 * _LOG2_E) * values * values)
    place = 1 / (1 + _POLE * size)
    tail = jnp.full_like(values, _POLYNOMIAL[-1])
    for coefficient in _POLYNOMIAL[-2::-1]:
        tail = tail * place + coefficient
    tail *= place * power
    return jnp.where(values < 0, tail, 1 - tail), power


class _Block:
    """Some tokens and columns."""

    def __init__(self, tokens: int, shape: tuple[int, int], first: Any, part: Any) -> None:
        self.shape = shape
        self.tokens, self.columns = span(first, shape[0]), span(part * shape[1], shape[1])
        whole = tokens % (shape[0] * _SPLITS) == 0
        self.inside = None if whole else column_of(self.tokens < tokens, shape)

    def load(self, ref: Any) -> Array:
        return load_block(ref, self.tokens, self.columns, self.inside).astype(jnp.float32)

    def vector(self, ref: Any, start: int) -> Array:
        return row_of(load_span(ref, start + self.columns, None), self.shape)

    def store(self, ref: Any, values: Array) -> None:
        store_block(ref, self.tokens, self.columns, self.inside, values)


def _forward_kernel(
    tokens: int,
    shape: tuple[int, int],
    start: int,
    product: Any,
    packed: Any,
    outputs: Any,
    *slope: Any,
) -> None:
    block = _Block(tokens, shape, pl.program_id(0) * shape[0], pl.program_id(1))
    values = block.load(product) + block.vector(packed, start)
    below, power = _distribution(values)
    block.store(outputs, values * below)
    if slope:
        block.store(slope[0], below + values * power * (1 / math.sqrt(2 * math.pi)))


def _backward_kernel(
    tokens: int,
    shape: tuple[int, int],
    splits: int,
    slope: Any,
    cotangent: Any,
    gradient: Any,
    sums: Any,
) -> None:
    split, part = pl.program_id(0), pl.program_id(1)
    steps = -(-tokens // (shape[0] * splits))

    def add_tokens(step: Any, total: Array) -> Array:
        block = _Block(tokens, shape, (split * steps + step) * shape[0], part)
        flowing = block.load(cotangent) * block.load(slope)
        block.store(gradient, flowing)
        return total + flowing

    total = jax.lax.fori_loop(0, steps, add_tokens, jnp.zeros(shape, jnp.float32)).sum(axis=0)
    columns = span(part * shape[1], shape[1])
    store_block(sums, jnp.full((1,), split, jnp.int32), columns, None, total[None])
