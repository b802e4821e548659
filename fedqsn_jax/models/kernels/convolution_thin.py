"""3x3 convolutions of images with one channel and ReLU, in kernels for NVIDIA GPUs.

With so few products per value, memory is all that counts: the outputs are written once, and the
gradients of kernel and bias come out of one reading of outputs and cotangents. Clients are a
``vmap`` axis, of which ``pallas_call`` makes an axis of the grid. Products are in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels.convolution_blocks import div, load_rows, rem, store_rows
from fedqsn_jax.models.kernels.convolution_kernels import LEAST_CHANNELS
from fedqsn_jax.models.kernels.gpu_blocks import span
from fedqsn_jax.models.kernels.triton_backend import pallas as pl
from fedqsn_jax.models.kernels.triton_backend import triton

# Measured on an H200 with 34 clients, 20 rows, 28x28x1 to 26x26x32.
_FORWARD_POSITIONS, _FORWARD_WARPS = 128, 4
_GRADIENT_POSITIONS, _GRADIENT_WARPS, _GRADIENT_SPLITS = 32, 4, 32
_TAPS = 9


def fits(kernel_shape: tuple[int, ...], stride: int) -> bool:
    """Whether the kernels here do a convolution ``[height, width, in, out]``."""
    outputs = kernel_shape[-1]
    narrow = outputs in (LEAST_CHANNELS, 2 * LEAST_CHANNELS, 4 * LEAST_CHANNELS)
    return stride == 1 and kernel_shape[:3] == (3, 3, 1) and narrow


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def convolve_relu(
    images: Array,
    kernel: Array,
    bias: Array,
    before: tuple[int, int],
    out_size: tuple[int, int],
    interpret: bool = False,
) -> Array:
    """Convolves with step 1, adds the bias, and takes ReLU.

    Args:
      images: ``[rows, height, width, 1]``, float32 or bfloat16.
      kernel: ``[3, 3, 1, out]``, of the same type, which is also the output's.
      bias: ``[out]``.
      before: Rows of padding above and columns left of the images.
      out_size: Height and width of the outputs; what windows see beyond the images is zero.
      interpret: Run without a GPU, slowly.
    """
    rows, outputs = images.shape[0], kernel.shape[-1]
    positions = rows * math.prod(out_size)

    def body(images: Any, kernel: Any, bias: Any, result: Any) -> None:
        number = span(pl.program_id(0) * _FORWARD_POSITIONS, _FORWARD_POSITIONS)
        pixels = _pixels(images, number, number < positions, out_size)
        channels = span(0, outputs)
        values = jnp.broadcast_to(
            bias[channels].astype(jnp.float32)[None], (_FORWARD_POSITIONS, outputs)
        )
        for tap in range(_TAPS):
            weights = kernel[jnp.full(channels.shape, tap, jnp.int32), channels]
            values += pixels(tap)[:, None] * weights.astype(jnp.float32)[None]
        store_rows(result, number, channels, number < positions, jnp.maximum(values, 0))

    flat = pl.pallas_call(
        body,
        jax.ShapeDtypeStruct((positions, outputs), images.dtype),
        grid=(-(-positions // _FORWARD_POSITIONS),),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_FORWARD_WARPS, num_stages=1),
        name="thin_convolution",
    )(_padded(images, before, out_size), kernel.reshape(_TAPS, outputs), bias)
    return flat.reshape(rows, *out_size, outputs)


def _forward(images, kernel, bias, before, out_size, interpret):
    outputs = convolve_relu(images, kernel, bias, before, out_size, interpret)
    return outputs, (images, kernel, bias, outputs)


def _backward(before, out_size, interpret, residuals, cotangent):
    images, kernel, bias, outputs = residuals
    to_kernel, to_bias = _parameter_gradients(
        images, outputs, cotangent, before, out_size, interpret
    )
    # Left out of the program where nobody asks for it, as for the first layer of a network.
    flowing = jnp.where(outputs > 0, cotangent, 0)
    pads = [
        (2 - first, size + first - out)
        for first, size, out in zip(before, images.shape[1:3], out_size, strict=True)
    ]
    to_images = jax.lax.conv_general_dilated(
        flowing,
        kernel[::-1, ::-1].swapaxes(2, 3),
        (1, 1),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (
        to_images,
        to_kernel.reshape(kernel.shape).astype(kernel.dtype),
        to_bias.astype(bias.dtype),
    )


convolve_relu.defvjp(_forward, _backward)


def _parameter_gradients(
    images: Array,
    outputs: Array,
    cotangent: Array,
    before: tuple[int, int],
    out_size: tuple[int, int],
    interpret: bool,
) -> tuple[Array, Array]:
    """Gradients of the kernel ``[9, out]`` and of the bias ``[out]``, float32."""
    count = outputs.shape[-1]
    positions = images.shape[0] * math.prod(out_size)
    splits = min(_GRADIENT_SPLITS, -(-positions // _GRADIENT_POSITIONS))
    steps = -(-positions // (_GRADIENT_POSITIONS * splits))

    def body(images: Any, outputs: Any, cotangent: Any, result: Any) -> None:
        split, channels = pl.program_id(0), span(0, count)

        def add(step: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            number = span((split * steps + step) * _GRADIENT_POSITIONS, _GRADIENT_POSITIONS)
            inside = number < positions
            pixels = _pixels(images, number, inside, out_size)
            slopes = load_rows(cotangent, number, inside, channels).astype(jnp.float32)
            flowing = jnp.where(load_rows(outputs, number, inside, channels) > 0, slopes, 0)
            *kernel, bias = sums
            kernel = [total + pixels(tap)[:, None] * flowing for tap, total in enumerate(kernel)]
            return *kernel, bias + flowing

        # Sums over positions are left to the end: until then no thread needs another's.
        zeros = (jnp.zeros((_GRADIENT_POSITIONS, count), jnp.float32),) * (_TAPS + 1)
        for place, total in enumerate(jax.lax.fori_loop(0, steps, add, zeros)):
            row = jnp.full(channels.shape, split * (_TAPS + 1) + place, jnp.int32)
            result[row, channels] = total.sum(axis=0)

    partial = pl.pallas_call(
        body,
        jax.ShapeDtypeStruct((splits * (_TAPS + 1), count), jnp.float32),
        grid=(splits,),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_GRADIENT_WARPS, num_stages=1),
        name="thin_convolution_gradient",
    )(_padded(images, before, out_size), outputs.reshape(-1, count), cotangent.reshape(-1, count))
    total = partial.reshape(splits, _TAPS + 1, count).sum(axis=0)
    return total[:_TAPS], total[_TAPS]


def _padded(images: Array, before: tuple[int, int], out_size: tuple[int, int]) -> Array:
    """Flat images with everything that windows see, so that a tap is no more than an offset."""
    pads = [
        (first, out + 2 - first - size)
        for first, size, out in zip(before, images.shape[1:3], out_size, strict=True)
    ]
    # Images with one channel are small: this costs nothing beside the outputs.
    return jax.lax.pad(
        images,
        jnp.zeros((), images.dtype),
        ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)),
    ).reshape(-1)


def _pixels(
    images: Any, number: Array, exists: Array, out_size: tuple[int, int]
) -> Callable[[int], Array]:
    """Returns ``tap -> [positions]``: what a tap of the window sees, float32."""
    width = out_size[1] + 2
    image, within = div(number, math.prod(out_size)), rem(number, math.prod(out_size))
    row, column = div(within, out_size[1]), rem(within, out_size[1])
    corner = jnp.where(exists, (image * (out_size[0] + 2) + row) * width + column, 0)

    def load(tap: int) -> Array:
        return images[corner + (tap // 3 * width + tap % 3)].astype(jnp.float32)

    return load
