"""Images and an untrained model that classifies them, as a configuration names them."""

from fedqsn_jax.config import Config, ConfigError
from fedqsn_jax.configured import root_key
from fedqsn_jax.data import registry
from fedqsn_jax.models.adapters import linen_apply, linen_init
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.problem import Problem
from fedqsn_jax.randomness import fold_in_name
from fedqsn_jax.tasks import classification


def load_image_problem(config: Config) -> Problem:
    """Loads images and initializes a model.

    Raises:
      ConfigError: The data cannot be had, or the model does not fit them.
    """
    splits = registry.load(config.data, config.seed)
    example = {name: rows[:1] for name, rows in splits.test.items()}
    module = make_model(config.model, splits.num_classes, config.client.dropout)
    try:
        params = linen_init(module, fold_in_name(root_key(config), "model"), example)
    except ValueError as error:
        raise ConfigError(
            f"model.name = {config.model.name!r} does not fit data.name = {config.data.name!r}: "
            f"{error}"
        ) from error
    pretraining = make_model(config.model, splits.num_classes, config.pretraining.dropout)
    apply_fn = linen_apply(module)
    return Problem(
        splits,
        params,
        apply_fn,
        linen_apply(pretraining),
        None,
        classification(),
    )
