"""The server's own training on its private rows, before the first round."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedqsn_jax.config.schema import (
    Config,
    ConfigError,
    PretrainingConfig,
    TrainingConfig,
    chooses_scale,
)
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import Selection, add_delta
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.data.population import FederatedData, single_client
from fedqsn_jax.protocol.proxy import whole_proxy
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_optimizer import ADAMW_EPSILON, ClientOptimizer, scheduled


def local_optimizer(settings: TrainingConfig) -> ClientOptimizer:
    """Returns the optimizer of a client's round, or of the server's own training."""
    makers = {
        "sgd": lambda rate: optax.sgd(rate, settings.momentum or None),
        "adam": optax.adam,
        "adamw": lambda rate: optax.adamw(
            rate, eps=ADAMW_EPSILON, weight_decay=settings.weight_decay
        ),
    }
    return scheduled(
        makers[settings.optimizer],
        settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        accumulate=settings.accumulate,
        clip_norm=settings.clip_norm,
    )


def hold_back(config: Config, private: Batch) -> tuple[Batch, Batch | None]:
    """Divides the server's rows into those it trains on, and those on which settings are chosen.

    Args:
      config: The settings: the last ``server.validation_rows`` are kept, if a scale is chosen.
      private: The server's rows.

    Returns:
      Rows to train on, and the others; None where nothing is chosen.

    Raises:
      ConfigError: There are not so many rows.
    """
    if not chooses_scale(config):
        return private, None
    kept, rows = config.server.validation_rows, jax.tree.leaves(private)[0].shape[0]
    if kept > rows:
        raise ConfigError(
            f"server.validation_rows = {kept}, on which server.scale = 0 is chosen: the server has "
            f"{rows} private rows; allowed is at most that, or server.scale above 0"
        )
    return (
        {name: array[: rows - kept] for name, array in private.items()},
        {name: array[rows - kept :] for name, array in private.items()},
    )


class Preparation(NamedTuple):
    """What the server does before the first round, where parameters hold more than one model.

    Attributes:
      trained: The tensors that it trains on its labelled rows.
      finish: ``(settings, key, params, private) -> params``: what it does then, on all of its rows,
        with the settings of its own training.
    """

    trained: Selection
    finish: Callable[[PretrainingConfig, Key, Params, Batch], Params]


def pretrain(
    config: Config,
    apply_fn: ApplyFn,
    task: Task,
    params: Params,
    private: Batch,
    preparation: Preparation | None = None,
) -> Params:
    """The server's own training on its private rows; without rows, none.

    Args:
      config: The settings: ``pretraining`` and the seed.
      apply_fn: The model, with the dropout of pre-training.
      task: Its loss.
      params: Its initial parameters.
      private: The server's rows.
      preparation: What is trained, and what follows; None: everything, and nothing.
    """
    train = make_pretraining(config.pretraining, apply_fn, task, preparation)
    return train(config.seed, params, private)


def make_pretraining(
    settings: PretrainingConfig,
    apply_fn: ApplyFn,
    task: Task,
    preparation: Preparation | None = None,
) -> Callable[[int, Params, Batch], Params]:
    """Makes `pretrain` for many: of a seed, parameters and private rows, compiled once."""
    trained = preparation.trained if preparation else None
    first = jnp.int32(0)
    update = make_client_update(
        apply_fn,
        task,
        local_optimizer(settings),
        settings.batch_size,
        steps=settings.steps,
        trained=trained,
    )

    def train(key: Array, params: Params, data: FederatedData) -> Params:
        result = update.train(key, whole_proxy(params, Sites()), data, first)
        return add_delta(params, result.delta)

    compiled = jax.jit(train)
    finish = jax.jit(functools.partial(preparation.finish, settings)) if preparation else None

    def pretrain(seed: int, params: Params, private: Batch) -> Params:
        key = root_key(seed)
        if settings.steps and jax.tree.leaves(private)[0].shape[0]:
            labelled = {name: rows[: settings.rows or None] for name, rows in private.items()}
            rows = single_client(labelled)
            params = compiled(fold_in_name(key, "pretraining"), params, rows)
        return finish(fold_in_name(key, "preparation"), params, private) if finish else params

    return pretrain


def first_steps(config: Config) -> Iterator[str]:
    """What the server does before the first round, which may take a while, a line each."""
    if config.pretraining.steps:
        yield f"the server trains on its own rows first, {config.pretraining.steps} steps"
    distillation = config.fedsp.distillation_steps
    if config.algorithm == "fedsp" and distillation:
        yield (
            f"the server distils on its own rows the small model that clients get, "
            f"{distillation} steps"
        )
