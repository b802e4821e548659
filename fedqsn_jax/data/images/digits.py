"""scikit-learn's handwritten digits: 1797 images of 8x8 pixels, shipped with the package."""

import numpy as np

from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.data.population import Splits
from fedqsn_jax.data.splits import make_splits, take


def load(config: DataConfig, generator: np.random.Generator) -> Splits:
    """Loads the digits: ``image`` float32 ``[64]`` in [0, 1], ``label`` int32.

    Raises:
      ConfigError: More test rows are asked for than there are.
    """
    from sklearn.datasets import load_digits  # Slow to import, and only this data set needs it.

    images, labels = load_digits(return_X_y=True)
    rows = {"image": (images / 16).astype(np.float32), "label": labels.astype(np.int32)}
    if config.test_rows >= len(labels):
        raise ConfigError(
            f"data.test_rows = {config.test_rows}: allowed is less than the {len(labels)} rows"
        )
    order = generator.permutation(len(labels))
    test, train = order[: config.test_rows], order[config.test_rows :]
    return make_splits(take(rows, train), take(rows, test), 10, config, generator)
