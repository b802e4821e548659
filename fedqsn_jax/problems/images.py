"""Images and an untrained model that classifies them, as a configuration names them."""

import jax

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.types import Batch, Key, Params
from fedqsn_jax.data import registry
from fedqsn_jax.models.functional import linen_apply, linen_init
from fedqsn_jax.models.kernels import gpu_blocks
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.problems.limits import check_initial
from fedqsn_jax.problems.problem import Problem, ProblemSettings


def _size_of(settings: ProblemSettings) -> str:
    """The setting that decides on the model's size."""
    model = settings.model
    of_cnn = "model.dense" if model.dense > max(model.channels) else "model.channels"
    return {"mlp": "model.hidden", "cnn": of_cnn}.get(model.name, "model.width")


def load_image_problem(settings: ProblemSettings, shapes: bool = False) -> Problem:
    """Loads images and initializes a model.

    Args:
      settings: Which.
      shapes: Whether of the parameters only their shapes are wanted, and nothing is initialized.

    Raises:
      ConfigError: The data cannot be had, the model does not fit them, or is too large.
    """
    splits = registry.load(settings.data, settings.seed)
    example = {name: rows[:1] for name, rows in splits.test.items()}
    module = make_model(settings.model, splits.num_classes, settings.client_dropout)
    key = fold_in_name(root_key(settings.seed), "model")
    size = _size_of(settings)

    def initial(key: Key, example: Batch) -> Params:
        return linen_init(module, key, example)

    try:
        params = jax.eval_shape(initial, key, example)
    except ValueError as error:
        raise ConfigError(
            f"model.name = {settings.model.name!r} does not fit "
            f"data.name = {settings.data.name!r}: {error}"
        ) from error
    check_initial(settings, size, params)
    if not shapes:
        params = initial(key, example)
    pretraining = make_model(settings.model, splits.num_classes, settings.server_dropout)
    apply_fn = linen_apply(module)
    return Problem(
        splits=splits,
        params=params,
        apply_fn=apply_fn,
        pretraining_apply=linen_apply(pretraining),
        client_apply=None,
        task=classification(),
        notes=gpu_blocks.missing_note(),
        size=size,
    )
