"""Two-dimensional convolution as one matrix product of patches and kernel.

Under ``vmap`` over clients with different kernels a native convolution becomes a grouped one, which
was measured 3 to 15 times slower on a GPU, and in loops on a CPU 40 times slower. A batched matrix
product is fast in both. On NVIDIA GPUs writing the patches is most of its time, so that there
`convolution_gpu` does the convolutions that it can; which it is, is decided when a function is
compiled for a device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.kernels import convolution_gpu, convolution_thin, gpu_blocks

_Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(images: Array, kernel: Array, stride: int = 1, padding: str = "SAME") -> Array:
    """Convolves, as ``jax.lax.conv_general_dilated`` with NHWC images and HWIO kernels does.

    Args:
      images: ``[rows, height, width, in]``.
      kernel: ``[kernel height, kernel width, in, out]``.
      stride: Step of the window in both directions.
      padding: ``SAME`` or ``VALID``.

    Returns:
      ``[rows, out height, out width, out]``.

    Raises:
      ValueError: The padding is unknown, or the window does not fit into the images.
    """
    pads, out_size = _placing(images.shape, kernel.shape, stride, padding)
    by_patches = functools.partial(_by_patches, stride=stride, pads=pads, out_size=out_size)
    if not convolution_gpu.fits(kernel.shape, stride):
        return by_patches(images, kernel)
    precision = convolution_gpu.current_precision(images.dtype)

    def by_kernels(images: Array, kernel: Array) -> Array:
        before = pads[0][0], pads[1][0]
        return convolution_gpu.convolve(images, kernel, before, out_size, precision)

    return _where_they_run(by_kernels, by_patches, images, kernel)


def convolve_relu(
    images: Array, kernel: Array, bias: Array, stride: int = 1, padding: str = "SAME"
) -> Array:
    """Convolves, adds a bias, and takes ReLU; one kernel for images with one channel on a GPU.

    Args:
      images: As for `convolve`.
      kernel: As for `convolve`.
      bias: ``[out]``.
      stride: As for `convolve`.
      padding: As for `convolve`.

    Returns:
      ``[rows, out height, out width, out]``.

    Raises:
      ValueError: As for `convolve`.
    """
    pads, out_size = _placing(images.shape, kernel.shape, stride, padding)

    def by_parts(images: Array, kernel: Array, bias: Array) -> Array:
        return nn.relu(convolve(images, kernel, stride, padding) + bias[None, None, None])

    if not convolution_thin.fits(kernel.shape, stride):
        return by_parts(images, kernel, bias)

    def by_kernels(images: Array, kernel: Array, bias: Array) -> Array:
        before = pads[0][0], pads[1][0]
        return convolution_thin.convolve_relu(images, kernel, bias, before, out_size)

    return _where_they_run(by_kernels, by_parts, images, kernel, bias)


def convolve_relu_pool(
    images: Array, kernel: Array, bias: Array, stride: int = 1, padding: str = "SAME"
) -> Array:
    """Convolves, adds a bias, and takes ReLU and `max_pool`, fused where a device can.

    Args:
      images: As for `convolve`.
      kernel: As for `convolve`.
      bias: ``[out]``.
      stride: As for `convolve`.
      padding: As for `convolve`.

    Returns:
      ``[rows, out height // 2, out width // 2, out]``.

    Raises:
      ValueError: As for `convolve`.
    """
    pads, out_size = _placing(images.shape, kernel.shape, stride, padding)

    def by_patches(images: Array, kernel: Array, bias: Array) -> Array:
        outputs = _by_patches(images, kernel, stride=stride, pads=pads, out_size=out_size)
        return max_pool(nn.relu(outputs + bias[None, None, None]))

    if not convolution_gpu.fits(kernel.shape, stride) or min(out_size) < 2:
        return by_patches(images, kernel, bias)
    precision = convolution_gpu.current_precision(images.dtype)

    def by_kernels(images: Array, kernel: Array, bias: Array) -> Array:
        before = pads[0][0], pads[1][0]
        return convolution_gpu.convolve_relu_pool(images, kernel, bias, before, out_size, precision)

    return _where_they_run(by_kernels, by_patches, images, kernel, bias)


def _where_they_run(
    by_kernels: Callable[..., Array], otherwise: Callable[..., Array], *arrays: Array
) -> Array:
    """Applies the one on NVIDIA GPUs that Triton supports, the other on all other devices."""
    if gpu_blocks.lacks_triton():
        return otherwise(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=by_kernels, default=otherwise)


def _placing(
    images: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: str
) -> tuple[_Pads, tuple[int, int]]:
    """Padding and size of the outputs, from shapes."""
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding = {padding!r}: allowed are SAME, VALID")
    pads: list[tuple[int, int]] = []
    out_size: list[int] = []
    for size, window in zip(images[1:3], kernel[:2], strict=True):
        pads.append(same_padding(size, window, stride) if padding == "SAME" else (0, 0))
        out_size.append((size + sum(pads[-1]) - window) // stride + 1)
    if min(out_size) < 1:
        raise ValueError(
            f"a {kernel[0]}x{kernel[1]} window does not fit into images {tuple(images[1:3])}"
        )
    return (pads[0], pads[1]), (out_size[0], out_size[1])


def _by_patches(
    images: Array, kernel: Array, *, stride: int, pads: _Pads, out_size: tuple[int, int]
) -> Array:
    height, width, inputs, outputs = kernel.shape
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    patches = [
        padded[
            :,
            row : row + (out_size[0] - 1) * stride + 1 : stride,
            column : column + (out_size[1] - 1) * stride + 1 : stride,
        ]
        for row in range(height)
        for column in range(width)
    ]
    stacked = jnp.concatenate(patches, axis=-1)
    flat = stacked.reshape(-1, height * width * inputs) @ kernel.reshape(-1, outputs)
    return flat.reshape(images.shape[0], *out_size, outputs)


def same_padding(size: int, window: int, stride: int) -> tuple[int, int]:
    """Returns the padding before and after, so that ``ceil(size / stride)`` positions come out."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


class Conv(nn.Module):
    """A convolution whose parameters have the names and shapes of ``flax.linen.Conv``'s.

    Attributes:
      features: Number of output channels.
      kernel_size: Height and width of the window.
      stride: Step of the window.
      padding: ``SAME`` or ``VALID``.
      use_bias: Whether a bias is added.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: str = "SAME"
    use_bias: bool = True

    def _parameters(self, inputs: int) -> tuple[Array, Array | None]:
        shape = (*self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros_init(), (self.features,))

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Convolves ``[rows, height, width, channels]``."""
        kernel, bias = self._parameters(images.shape[-1])
        outputs = convolve(images, kernel, self.stride, self.padding)
        return outputs if bias is None else outputs + bias[None, None, None]


class ConvRelu(Conv):
    """A `Conv` with its bias and ReLU, in one kernel where a device has one."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps ``[rows, height, width, channels]`` to outputs of a `Conv`'s size."""
        kernel, bias = self._parameters(images.shape[-1])
        if bias is None:
            bias = jnp.zeros((self.features,), kernel.dtype)
        return convolve_relu(images, kernel, bias, self.stride, self.padding)


class ConvReluPool(Conv):
    """A `Conv` with its bias, ReLU and `max_pool`, in one kernel where a device has one."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps ``[rows, height, width, channels]`` to half the size of a `Conv`'s outputs."""
        kernel, bias = self._parameters(images.shape[-1])
        if bias is None:
            bias = jnp.zeros((self.features,), kernel.dtype)
        return convolve_relu_pool(images, kernel, bias, self.stride, self.padding)


def max_pool(images: Array) -> Array:
    """Takes the maximum over 2x2 windows; an odd last row or column is dropped.

    By a reshape, because the gradient of a native pooling is slow under ``vmap``.
    """
    rows, height, width, channels = images.shape
    height, width = height // 2, width // 2
    windows = images[:, : 2 * height, : 2 * width].reshape(rows, height, 2, width, 2, channels)
    return windows.max(axis=(2, 4))
