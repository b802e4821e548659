"""Models by their configured name."""

from flax import linen as nn

from fedqsn_jax.config.schema import LANGUAGE, ConfigError, ModelConfig
from fedqsn_jax.models.image.cnn import CNN
from fedqsn_jax.models.image.mlp import MLP
from fedqsn_jax.models.image.resnet import ResNet18


def make_model(config: ModelConfig, classes: int, dropout: float = 0.0) -> nn.Module:
    """Returns the module that a configuration names.

    Args:
      config: Its name and widths.
      classes: Number of logits.
      dropout: Dropout rate; it changes no parameters.

    Raises:
      ConfigError: It is a language model, which its own directory describes.
    """
    if config.name == LANGUAGE:
        raise ConfigError(
            f"model.name = {LANGUAGE!r}: fedqsn_jax.make_language_model makes such a model, of "
            f"what fedqsn_jax.read_config reads in the run's model/"
        )
    if config.name == "mlp":
        return MLP(config.hidden, classes, dropout)
    if config.name == "resnet18":
        return ResNet18(classes, config.width, config.stem, dropout)
    return CNN(config.channels, config.dense, classes, dropout)
