"""Convolutions for NVIDIA GPUs, which never write patches to memory.

A convolution by patches moves every pixel as often through memory as the window has places, and is
bound by that. The kernels of `convolution_kernels` gather patches on the way to the tensor cores,
an implicit matrix product. Fused with ReLU and pooling, what the convolution puts out is not
written either: of each window the maximum is kept, and one byte that says which of the four it was.
The backward kernels expand cotangents by it while they load.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.convolution_kernels import (
    LEAST_CHANNELS,
    Geometry,
    correlate,
    halved,
    kernel_gradient,
)


def fits(kernel_shape: tuple[int, ...], stride: int) -> bool:
    """Whether the kernels here do a convolution ``[height, width, in, out]``."""
    height, width, inputs, outputs = kernel_shape
    whole = inputs % LEAST_CHANNELS == 0 and outputs % LEAST_CHANNELS == 0
    return stride == 1 and (height, width) == (3, 3) and whole


def current_precision(dtype: Any) -> jax.lax.Precision:
    """The precision that a matrix product traced now has on a GPU: TF32 unless more is asked for.

    To be called where the convolution is, not in its backward pass: that may be traced after the
    context of ``jax.default_matmul_precision`` has ended.
    """
    asked = jax.config.values["jax_default_matmul_precision"]
    exact = str(asked).lower() in ("highest", "float32", "f32_f32_f32") and dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def convolve(
    images: Array,
    kernel: Array,
    before: tuple[int, int],
    out_size: tuple[int, int],
    precision: jax.lax.Precision,
    interpret: bool = False,
) -> Array:
    """Convolves with step 1.

    Args:
      images: ``[rows, height, width, in]``, float32 or bfloat16.
      kernel: ``[height, width, in, out]``, of the same type, which is also the output's.
      before: Rows of padding above and columns left of the images.
      out_size: Height and width of the outputs; what windows see beyond the images is zero.
      precision: Of the products of float32 values; sums are always float32.
      interpret: Run without a GPU, slowly.
    """
    geometry = _geometry(images, kernel, before, out_size)
    outputs = correlate(geometry, precision, interpret, _flat(images), _taps(kernel.swapaxes(2, 3)))
    return outputs.reshape(images.shape[0], *out_size, -1)


def _convolve_forward(images, kernel, before, out_size, precision, interpret):
    outputs = convolve(images, kernel, before, out_size, precision, interpret)
    return outputs, (images, kernel)


def _convolve_backward(before, out_size, precision, interpret, residuals, cotangent):
    images, kernel = residuals
    geometry = _geometry(images, kernel, before, out_size)
    return _gradients(geometry, precision, interpret, images, kernel, _flat(cotangent), None)[:2]


convolve.defvjp(_convolve_forward, _convolve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def convolve_relu_pool(
    images: Array,
    kernel: Array,
    bias: Array,
    before: tuple[int, int],
    out_size: tuple[int, int],
    precision: jax.lax.Precision,
    interpret: bool = False,
) -> Array:
    """Convolves with step 1, adds the bias, and takes ReLU and the maximum over 2x2 windows.

    Args:
      images: As for `convolve`.
      kernel: As for `convolve`.
      bias: ``[out]``.
      before: As for `convolve`.
      out_size: Height and width before the pooling, which drops an odd last row or column.
      precision: As for `convolve`.
      interpret: As for `convolve`.
    """
    static = before, out_size, precision, interpret
    return _convolve_relu_pool_forward(images, kernel, bias, *static)[0]


def _convolve_relu_pool_forward(images, kernel, bias, before, out_size, precision, interpret):
    geometry = _geometry(images, kernel, before, out_size)
    pooled, which = correlate(
        geometry, precision, interpret, _flat(images), _taps(kernel.swapaxes(2, 3)), bias=bias
    )
    shape = (images.shape[0], *halved(out_size), kernel.shape[-1])
    return pooled.reshape(shape), (images, kernel, bias, which)


def _convolve_relu_pool_backward(before, out_size, precision, interpret, residuals, cotangent):
    images, kernel, bias, which = residuals
    geometry = _geometry(images, kernel, before, out_size)
    *gradients, to_bias = _gradients(
        geometry, precision, interpret, images, kernel, _flat(cotangent), which
    )
    return *gradients, to_bias.astype(bias.dtype)


convolve_relu_pool.defvjp(_convolve_relu_pool_forward, _convolve_relu_pool_backward)


def _geometry(
    images: Array, kernel: Array, before: tuple[int, int], out_size: tuple[int, int]
) -> Geometry:
    rows, in_height, in_width, inputs = images.shape
    height, width, _, outputs = kernel.shape
    in_size, window = (in_height, in_width), (height, width)
    return Geometry(rows, in_size, out_size, window, before, inputs, outputs)


def _flat(images: Array) -> Array:
    return images.reshape(-1, images.shape[-1])


def _taps(kernel: Array) -> Array:
    return kernel.reshape(-1, *kernel.shape[2:])


def _gradients(
    geometry: Geometry,
    precision: jax.lax.Precision,
    interpret: bool,
    images: Array,
    kernel: Array,
    cotangent: Array,
    which: Array | None,
) -> tuple[Array, Array, Array]:
    """Cotangents of images, kernel and bias; with ``which``, ``cotangent`` is the pooled one's."""
    turned = _taps(kernel[::-1, ::-1])
    to_images = correlate(
        geometry.transposed(), precision, interpret, cotangent, turned, which=which
    )
    to_kernel, to_bias = kernel_gradient(
        geometry, precision, interpret, _flat(images), cotangent, which
    )
    to_kernel = to_kernel.reshape(kernel.shape).astype(kernel.dtype)
    return to_images.reshape(images.shape), to_kernel, to_bias
