"""FedSP's problem: an encoder classifier, prompts for it, and the small model that clients have."""

import optax

from fedqsn_jax.config.schema import ConfigError, FedSPConfig, PretrainingConfig
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.types import ApplyFn, Batch, Key, Params
from fedqsn_jax.data.population import Splits
from fedqsn_jax.models.language.encoder_config import EncoderConfig
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.problems.problem import Problem, ProblemSettings
from fedqsn_jax.problems.training import Preparation
from fedqsn_jax.prompting.prompted_model import (
    Distillation,
    PromptedApply,
    add_prompts,
    auxiliary_encoder,
    distil,
    full_tensors,
    prompted_apply,
    prompted_encoder,
    take_auxiliary,
)
from fedqsn_jax.rounds.client_optimizer import scheduled


def prompted_problem(
    settings: ProblemSettings,
    prompted: FedSPConfig,
    splits: Splits,
    architecture: EncoderConfig,
    params: Params,
    execution: Execution,
    task: Task,
    notes: tuple[str, ...] = (),
) -> Problem:
    """Makes a problem of an encoder's; its parameters are the tree that `prompted_model` describes.

    The server trains the full model with the untrained prompts in place, so that these are no
    handicap; then it takes the auxiliary model's layers from it, and distils them.

    Args:
      settings: Those of the problem: dropout, the seed.
      prompted: The method's own of them.
      splits: The data.
      architecture: The encoder.
      params: Its parameters.
      execution: How it is computed.
      task: What it is for.
      notes: What the user should know.

    Raises:
      ConfigError: The encoder has no such layers.
    """
    try:
        key = fold_in_name(root_key(settings.seed), "prompts")
        whole = add_prompts(
            key, params, count=prompted.prompts, layers=prompted.layers, passes=prompted.passes
        )
    except ValueError as error:
        raise ConfigError(f"fedsp.{error}") from error

    def encoders(dropout: float) -> tuple[PromptedApply, PromptedApply]:
        dropping = architecture.with_dropout(dropout)
        return (
            prompted_encoder(dropping, execution),
            auxiliary_encoder(dropping, len(prompted.layers), prompted.passes, execution),
        )

    def apply_of(dropout: float) -> ApplyFn:
        return prompted_apply(*encoders(dropout))

    def finish(training: PretrainingConfig, key: Key, params: Params, private: Batch) -> Params:
        params = take_auxiliary(params, prompted.layers)
        if not prompted.distillation_steps:
            return params
        full, auxiliary = encoders(0.0)
        how = Distillation(
            optimizer=scheduled(optax.adam, prompted.distillation_rate),
            steps=prompted.distillation_steps,
            batch_size=training.batch_size,
            temperature=prompted.temperature,
            noise=prompted.distillation_noise,
        )
        aligned, _ = distil(key, full, auxiliary, params=params, rows=private, settings=how)
        return aligned

    clients = apply_of(settings.client_dropout)
    return Problem(
        splits=splits,
        params=whole,
        apply_fn=clients,
        pretraining_apply=apply_of(settings.server_dropout),
        client_apply=clients,
        task=task,
        preparation=Preparation(full_tensors(whole), finish),
        notes=notes,
    )
