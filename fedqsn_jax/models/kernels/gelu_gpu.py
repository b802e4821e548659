"""GELU of a biased product for NVIDIA GPUs, in Pallas for the Triton compiler.

The exact GELU is bound by arithmetic when the error function is computed to the last bit and its
derivative's exponential beside it. Here both come from one exponential, to 5e-7. The forward pass
keeps the derivative in place of what it is the derivative at, so that the backward pass is bound by
memory alone; it sums the gradient of the bias on the way. Where products are in bfloat16 the
derivative is kept in 8 bits: it lies between -0.129 and 1.129, and one step is 1/202, so that it is
off by 0.0025 at most; below -3.54 it is 0, above 3.54 it is 1. bfloat16 is off by up to 0.0039
above 1, and nearer to 0 less than the codes are.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.gpu_blocks import (
    Arithmetic,
    Packed,
    column_of,
    load_block,
    load_span,
    row_of,
    span,
    store_block,
)
from fedqsn_jax.models.kernels.triton_backend import pallas as pl
from fedqsn_jax.models.kernels.triton_backend import triton

# Tokens and columns of a program; measured on an H200 with 8192 tokens of 3072 columns.
_FORWARD_BLOCK = 4, 1024
_BACKWARD_BLOCK = 8, 256
_LEAST_COLUMNS = 128
_WARPS = 8
_SPLITS = 64
# Of the error function's approximation 7.1.26 in Abramowitz and Stegun, halved.
_POLYNOMIAL = tuple(
    0.5 * each for each in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)
_POLE = 0.3275911 * math.sqrt(0.5)
_LOG2_E = math.log2(math.e)
# Codes of the derivative are 1 to 255, from its least to its greatest value; 0 and 1 are exact.
_CODES_PER_UNIT = 202
_CODE_OF_ZERO = 27
# From here to its double float32 values are the whole numbers: a sum with it is rounded to one,
# whose lowest byte is the code.
_FIRST_WHOLE = 2.0**23


def fits(columns: int, dtype: Any) -> bool:
    """Whether the kernels here do products of so many columns."""
    return columns % _LEAST_COLUMNS == 0 and jnp.dtype(dtype) == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def biased_gelu(interpret: bool, product: Array, bias: Array, packed: Packed) -> Array:
    """``gelu(product + bias)``, the exact one.

    Args:
      interpret: Run without a GPU, slowly.
      product: ``[..., columns]``; bfloat16, or, which `fits` refuses as nothing but tests needs it,
        float32, whose derivative is kept in float32.
      bias: Float32 ``[columns]``, which gradients are with respect to.
      packed: Where its values are read; ``starts`` is the place of the first, a static integer.

    Returns:
      The same shape and type as the product. The gradient is by the derivative as it is kept.
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
            jax.ShapeDtypeStruct(flat.shape, cotangent.dtype),
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
    outputs = jax.ShapeDtypeStruct(flat.shape, flat.dtype)
    slope = jax.ShapeDtypeStruct(flat.shape, jnp.uint8 if _in_codes(flat) else flat.dtype)
    results = pl.pallas_call(
        functools.partial(_forward_kernel, Arithmetic(interpret), tokens, block, packed.starts),
        (outputs, slope) if keeps_slope else (outputs,),
        grid=(-(-tokens // block[0]), columns // block[1]),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="biased_gelu",
    )(flat, packed.values)
    return [each.reshape(product.shape) for each in results]


def _flat(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def _in_codes(product: Any) -> bool:
    """Whether the derivative is kept in 8 bits."""
    return product.dtype == jnp.bfloat16


def _code(arithmetic: Arithmetic, slope: Array) -> Array:
    """The uint8 codes of float32 derivatives; where GELU is not finite, anything."""
    # Conversions from float32 to integers would be the slowest part of the kernel.
    whole = arithmetic.multiply_add(slope, _CODES_PER_UNIT, _FIRST_WHOLE + _CODE_OF_ZERO)
    return jax.lax.bitcast_convert_type(whole, jnp.uint32).astype(jnp.uint8)


def _decoded(slope: Array) -> Array:
    """Float32 derivatives of what was kept, uint8 codes or float32."""
    if slope.dtype != jnp.uint8:
        return slope
    bits = slope.astype(jnp.uint32) | np.float32(_FIRST_WHOLE).view(np.uint32)
    whole = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return (whole - (_FIRST_WHOLE + _CODE_OF_ZERO)) * (1 / _CODES_PER_UNIT)


def _distribution(arithmetic: Arithmetic, values: Array) -> tuple[Array, Array]:
    """The normal distribution function and ``exp(-x**2 / 2)``, of float32 values."""
    power = arithmetic.exp2((-0.5 * _LOG2_E) * values * values)
    place = arithmetic.reciprocal(arithmetic.multiply_add(jnp.abs(values), _POLE, 1.0))
    tail = jnp.full_like(values, _POLYNOMIAL[-1])
    for coefficient in _POLYNOMIAL[-2::-1]:
        tail = arithmetic.multiply_add(tail, place, coefficient)
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
        return load_block(ref, self.tokens, self.columns, self.inside)

    def vector(self, ref: Any, start: int) -> Array:
        return row_of(load_span(ref, start + self.columns, None), self.shape)

    def store(self, ref: Any, values: Array) -> None:
        store_block(ref, self.tokens, self.columns, self.inside, values)


def _forward_kernel(
    arithmetic: Arithmetic,
    tokens: int,
    shape: tuple[int, int],
    start: int,
    product: Any,
    packed: Any,
    outputs: Any,
    *slope: Any,
) -> None:
    block = _Block(tokens, shape, pl.program_id(0) * shape[0], pl.program_id(1))
    values = block.load(product).astype(jnp.float32) + block.vector(packed, start)
    below, power = _distribution(arithmetic, values)
    block.store(outputs, values * below)
    if slope:
        density = power * (1 / math.sqrt(2 * math.pi))
        derivative = arithmetic.multiply_add(values, density, below)
        in_codes = _in_codes(product)
        block.store(slope[0], _code(arithmetic, derivative) if in_codes else derivative)


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
        flowing = block.load(cotangent).astype(jnp.float32) * _decoded(block.load(slope))
        block.store(gradient, flowing)
        return total + flowing

    total = jax.lax.fori_loop(0, steps, add_tokens, jnp.zeros(shape, jnp.float32)).sum(axis=0)
    columns = span(part * shape[1], shape[1])
    store_block(sums, jnp.full((1,), split, jnp.int32), columns, None, total[None])
