"""Images and an untrained model that classifies them, as a configuration names them."""

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.data import registry
from fedqsn_jax.models.functional import linen_apply, linen_init
from fedqsn_jax.models.kernels import gpu_blocks
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.problems.problem import Problem, ProblemSettings


def load_image_problem(settings: ProblemSettings) -> Problem:
    """Loads images and initializes a model.

    Raises:
      ConfigError: The data cannot be had, or the model does not fit them.
    """
    splits = registry.load(settings.data, settings.seed)
    example = {name: rows[:1] for name, rows in splits.test.items()}
    module = make_model(settings.model, splits.num_classes, settings.client_dropout)
    try:
        params = linen_init(module, fold_in_name(root_key(settings.seed), "model"), example)
    except ValueError as error:
        raise ConfigError(
            f"model.name = {settings.model.name!r} does not fit "
            f"data.name = {settings.data.name!r}: {error}"
        ) from error
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
    )
