"""A multilayer perceptron."""

import functools

import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.core.types import Array


def as_floats(images: Array) -> Array:
    """Scales uint8 images to [0, 1]; leaves floating-point images as they are.

    The result is float32 of a weak type: a layer with bfloat16 parameters computes in bfloat16.
    """
    if images.dtype == jnp.uint8:
        return images * 1.0 / 255
    return images


class MLP(nn.Module):
    """Dense layers with ReLU and dropout, then the task head.

    Attributes:
      hidden: Widths of the hidden layers.
      classes: Number of logits.
      dropout: Dropout rate after each hidden layer.
    """

    hidden: tuple[int, ...]
    classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits ``[rows, classes]`` of ``images`` ``[rows, ...]``."""
        # He's initial weights keep the variance through ReLU (arXiv 1502.01852).
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.he_normal())
        values = as_floats(images).reshape(images.shape[0], -1)
        for index, width in enumerate(self.hidden):
            values = nn.relu(dense(width, name=f"hidden_{index}")(values))
            values = nn.Dropout(self.dropout, deterministic=not train)(values)
        return dense(self.classes, name="head")(values)
