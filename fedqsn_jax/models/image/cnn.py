"""A small convolutional network with group norm."""

import math

from flax import linen as nn

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.image.mlp import as_floats
from fedqsn_jax.models.kernels.convolution import Conv, max_pool

_GROUPS = 8


class CNN(nn.Module):
    """3x3 convolutions, each with group norm, ReLU and pooling; a dense layer; the task head.

    Group norm, because batch norm keeps running statistics, which no mask covers.

    Attributes:
      channels: Output channels of the convolutions.
      dense: Width of the dense layer.
      classes: Number of logits.
      dropout: Dropout rate before and after the dense layer.
    """

    channels: tuple[int, ...]
    dense: int
    classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits ``[rows, classes]`` of ``images`` ``[rows, height, width, channels]``.

        Raises:
          ValueError: The images have another number of axes, or too few pixels for the poolings.
        """
        smallest = 2 ** len(self.channels)
        if images.ndim != 4 or min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"a CNN with {len(self.channels)} poolings needs images [height, width, channels] "
                f"of {smallest}x{smallest} pixels or more; these are {list(images.shape[1:])}"
            )
        values = as_floats(images)
        for index, channels in enumerate(self.channels):
            values = Conv(channels, name=f"conv_{index}")(values)
            groups = math.gcd(channels, _GROUPS)
            values = nn.relu(nn.GroupNorm(groups, name=f"norm_{index}")(values))
            values = max_pool(values)
        values = values.reshape(images.shape[0], -1)
        values = nn.Dropout(self.dropout, deterministic=not train)(values)
        values = nn.relu(nn.Dense(self.dense, name="dense")(values))
        values = nn.Dropout(self.dropout, deterministic=not train)(values)
        return nn.Dense(self.classes, name="head")(values)
