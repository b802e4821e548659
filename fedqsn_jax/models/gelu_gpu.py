"""GELU of a biased product for NVIDIA GPUs, in Pallas for the Triton compiler.

The exact GELU is bound by arithmetic when the error function is computed to the last bit and its
derivative's exponential beside it. Here both come from one exponential, to 2e-7, and the gradient
of the bias is summed in the pass that makes the product's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fedqsn_jax.models.gpu_blocks import (
    column_of,
    load_block,
    load_span,
    row_of,
    span,
    store_block,
)
from fedqsn_jax.types import Array

_TOKENS = 8
_COLUMNS = 256
_LEAST_COLUMNS = 128
_WARPS = 4
_SPLITS = 128
# Of the error function's approximation 7.1.26 in Abramowitz and Stegun, halved.
_POLYNOMIAL = tuple(
    0.5 * each for each in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)
_POLE = 0.3275911 * math.sqrt(0.5)


def fits(columns: int, dtype: Any) -> bool:
    """Whether the kernels here do products of so many columns."""
    return columns % _LEAST_COLUMNS == 0 and jnp.dtype(dtype) == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def biased_gelu(interpret: bool, product: Array, bias: Array) -> Array:
    """``gelu(product + bias)``, the exact one, of ``[..., columns]`` and float32 ``[columns]``."""
    flat = _flat(product)
    tokens, columns = flat.shape
    width = math.gcd(columns, _COLUMNS)
    outputs = pl.pallas_call(
        functools.partial(_forward_kernel, tokens, width),
        jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        grid=(-(-tokens // _TOKENS), columns // width),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="biased_gelu",
    )(flat, bias)
    return outputs.reshape(product.shape)


def _biased_gelu_forward(interpret, product, bias):
    return biased_gelu(interpret, product, bias), (product, bias)


def _biased_gelu_backward(interpret, residuals, cotangent):
    product, bias = residuals
    flat = _flat(product)
    tokens, columns = flat.shape
    width, splits = math.gcd(columns, _COLUMNS), min(_SPLITS, -(-tokens // _TOKENS))
    gradient, sums = pl.pallas_call(
        functools.partial(_backward_kernel, tokens, width, splits),
        (
            jax.ShapeDtypeStruct(flat.shape, flat.dtype),
            jax.ShapeDtypeStruct((splits, columns), jnp.float32),
        ),
        grid=(splits, columns // width),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="biased_gelu_gradient",
    )(flat, bias, _flat(cotangent))
    return gradient.reshape(product.shape), sums.sum(axis=0).astype(bias.dtype)


biased_gelu.defvjp(_biased_gelu_forward, _biased_gelu_backward)


def _flat(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def _distribution(values: Array) -> tuple[Array, Array]:
    """The normal distribution function and ``exp(-x**2 / 2)``, of float32 values."""
    size = jnp.abs(values)
    power = jnp.exp(-0.5 * values * values)
    place = 1 / (1 + _POLE * size)
    tail = jnp.full_like(values, _POLYNOMIAL[-1])
    for coefficient in _POLYNOMIAL[-2::-1]:
        tail = tail * place + coefficient
    tail *= place * power
    return jnp.where(values < 0, tail, 1 - tail), power


class _Block:
    """Some tokens and columns."""

    def __init__(self, tokens: int, width: int, first: Any, part: Any) -> None:
        self.tokens, self.columns = span(first, _TOKENS), span(part * width, width)
        self.shape = _TOKENS, width
        whole = tokens % (_TOKENS * _SPLITS) == 0
        self.inside = None if whole else column_of(self.tokens < tokens, self.shape)

    def load(self, ref: Any) -> Array:
        return load_block(ref, self.tokens, self.columns, self.inside).astype(jnp.float32)

    def vector(self, ref: Any) -> Array:
        return row_of(load_span(ref, self.columns, None).astype(jnp.float32), self.shape)

    def store(self, ref: Any, values: Array) -> None:
        store_block(ref, self.tokens, self.columns, self.inside, values)


def _forward_kernel(tokens: int, width: int, product: Any, bias: Any, outputs: Any) -> None:
    block = _Block(tokens, width, pl.program_id(0) * _TOKENS, pl.program_id(1))
    values = block.load(product) + block.vector(bias)
    block.store(outputs, values * _distribution(values)[0])


def _backward_kernel(
    tokens: int,
    width: int,
    splits: int,
    product: Any,
    bias: Any,
    cotangent: Any,
    gradient: Any,
    sums: Any,
) -> None:
    split, part = pl.program_id(0), pl.program_id(1)
    steps = -(-tokens // (_TOKENS * splits))

    def add_tokens(step: Any, total: Array) -> Array:
        block = _Block(tokens, width, (split * steps + step) * _TOKENS, part)
        values = block.load(product) + block.vector(bias)
        below, power = _distribution(values)
        slope = below + values * power * (1 / math.sqrt(2 * math.pi))
        flowing = block.load(cotangent) * slope
        block.store(gradient, flowing)
        return total + flowing

    zeros = jnp.zeros((_TOKENS, width), jnp.float32)
    total = jax.lax.fori_loop(0, steps, add_tokens, zeros).sum(axis=0)
    columns = span(part * width, width)
    store_block(sums, jnp.full((1,), split, jnp.int32), columns, None, total[None])
