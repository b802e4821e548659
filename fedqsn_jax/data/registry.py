"""Images by their configured name, and the generator that divides any data."""

import numpy as np

from fedqsn_jax.config.schema import DataConfig
from fedqsn_jax.data.images import digits, tfds_images
from fedqsn_jax.data.population import Splits

_STREAM = 0x64617461  # Keeps this generator apart from others with the same seed.


def load(config: DataConfig, seed: int) -> Splits:
    """Loads a data set and divides it; the seed fixes the division.

    Args:
      config: Which data, and how it is divided.
      seed: Fixes every draw.

    Returns:
      The splits: clients' rows where ``config.resident`` says, the others on the default device.

    Raises:
      ConfigError: The data set is not there, or cannot be divided as configured.
    """
    if config.name == "digits":
        return digits.load(config, generator(seed))
    return tfds_images.load(config, generator(seed))


def generator(seed: int) -> np.random.Generator:
    """Returns what decides how a run's data are divided."""
    return np.random.default_rng([seed, _STREAM])
