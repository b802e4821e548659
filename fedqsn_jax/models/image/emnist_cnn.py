"""The convolutional network with which federated methods are compared on EMNIST."""

from flax import linen as nn

from fedqsn_jax.core.types import Array
from fedqsn_jax.models.image.mlp import as_floats
from fedqsn_jax.models.kernels.convolution import ConvRelu, ConvReluPool


class EmnistCNN(nn.Module):
    """The network of Reddi et al. (arXiv 2003.00295, table 4): 1.2 million parameters.

    Attributes:
      classes: Number of logits.
      dropout: Dropout rates before and after the dense layer; both zero switch it off.
    """

    classes: int
    dropout: tuple[float, float] = (0.25, 0.5)

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns logits ``[rows, classes]`` of ``images`` ``[rows, 28, 28, 1]``."""
        values = as_floats(images)
        values = ConvRelu(32, padding="VALID", name="conv_0")(values)
        values = ConvReluPool(64, padding="VALID", name="conv_1")(values)
        values = values.reshape(images.shape[0], -1)
        values = nn.Dropout(self.dropout[0], deterministic=not train)(values)
        values = nn.relu(nn.Dense(128, name="dense")(values))
        values = nn.Dropout(self.dropout[1], deterministic=not train)(values)
        return nn.Dense(self.classes, name="head")(values)
