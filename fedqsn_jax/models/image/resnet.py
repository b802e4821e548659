"""ResNet-18 with group norm."""

import functools
import math

import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.config.schema import STEMS
from fedqsn_jax.core.types import Array
from fedqsn_jax.models.image.mlp import as_floats
from fedqsn_jax.models.kernels.convolution import Conv, same_padding

_BLOCKS = (2, 2, 2, 2)
_GROUPS = 32


class ResNet18(nn.Module):
    """The network of He et al. (arXiv 1512.03385, table 1), with group norm (arXiv 1803.08494).

    Four stages of two basic blocks; each stage after the first halves the size and doubles the
    channels. Convolutions have no bias, because norms follow them. Group norm, because batch norm
    keeps running statistics, which no mask covers.

    Attributes:
      classes: Number of logits.
      width: Channels of the first stage.
      stem: ``cifar``, a 3x3 convolution, or ``imagenet``, 7x7 with stride 2 and a pooling.
      dropout: Dropout rate before the task head.
    """

    classes: int
    width: int = 64
    stem: str = "cifar"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits ``[rows, classes]`` of ``images`` ``[rows, height, width, channels]``.

        Raises:
          ValueError: The stem is unknown, or the images have another number of axes.
        """
        if self.stem not in STEMS:
            raise ValueError(f"stem = {self.stem!r}: allowed are {', '.join(STEMS)}")
        if images.ndim != 4:
            raise ValueError(
                "a ResNet needs images [height, width, channels]; these are "
                f"{list(images.shape[1:])}"
            )
        values = as_floats(images)
        if self.stem == "cifar":
            values = Conv(self.width, use_bias=False, name="stem")(values)
        else:
            values = Conv(self.width, (7, 7), stride=2, use_bias=False, name="stem")(values)
        values = nn.relu(_norm(values, "stem_norm"))
        if self.stem == "imagenet":
            values = _overlapping_pool(values)
        for stage, blocks in enumerate(_BLOCKS):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                block = BasicBlock(self.width * 2**stage, stride, name=f"block_{stage}_{index}")
                values = block(values)
        values = values.mean(axis=(1, 2))
        values = nn.Dropout(self.dropout, deterministic=not train)(values)
        return nn.Dense(self.classes, name="head")(values)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is projected where shapes differ.

    Attributes:
      channels: Output channels.
      stride: Step of the first convolution and of the projection.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, values: Array) -> Array:
        """Maps ``[rows, height, width, in]`` to ``[rows, out height, out width, channels]``."""
        shortcut = values
        if self.stride != 1 or values.shape[-1] != self.channels:
            projection = Conv(self.channels, (1, 1), self.stride, use_bias=False, name="projection")
            shortcut = _norm(projection(values), "projection_norm")
        values = Conv(self.channels, stride=self.stride, use_bias=False, name="conv_0")(values)
        values = nn.relu(_norm(values, "norm_0"))
        values = Conv(self.channels, use_bias=False, name="conv_1")(values)
        return nn.relu(_norm(values, "norm_1") + shortcut)


def _norm(values: Array, name: str) -> Array:
    """Normalizes groups of channels; the call makes a submodule of the calling one."""
    return nn.GroupNorm(math.gcd(values.shape[-1], _GROUPS), name=name)(values)


def _overlapping_pool(images: Array) -> Array:
    """Takes the maximum over 3x3 windows, step 2, of values that are not negative.

    By slices, because the gradient of a native pooling is slow under ``vmap``.
    """
    height, width = images.shape[1:3]
    pads = same_padding(height, 3, 2), same_padding(width, 3, 2)
    # Zeros pad as minus infinity would: nothing is smaller.
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    windows = [
        padded[:, row : row + height : 2, column : column + width : 2]
        for row in range(3)
        for column in range(3)
    ]
    return functools.reduce(jnp.maximum, windows)
