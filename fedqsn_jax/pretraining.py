"""The server's own training on its private rows, before the first round."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedqsn_jax.client import make_client_update
from fedqsn_jax.config import Config, with_fields
from fedqsn_jax.configured import local_optimizer, root_key
from fedqsn_jax.data.federated import FederatedData, single_client
from fedqsn_jax.proxy import whole_proxy
from fedqsn_jax.randomness import fold_in_name
from fedqsn_jax.tasks import Task
from fedqsn_jax.types import ApplyFn, Array, Batch, Params


def pretrain(
    config: Config, apply_fn: ApplyFn, task: Task, params: Params, private: Batch
) -> Params:
    """The server's own training on its private rows; without rows, none.

    Args:
      config: The settings: ``pretraining`` and the seed.
      apply_fn: The model, with the dropout of pre-training.
      task: Its loss.
      params: Its initial parameters.
      private: The server's rows.
    """
    return make_pretraining(config, apply_fn, task)(config.seed, params, private)


def make_pretraining(
    config: Config, apply_fn: ApplyFn, task: Task
) -> Callable[[int, Params, Batch], Params]:
    """Makes `pretrain` for many: of a seed, parameters and private rows, compiled once."""
    settings = config.pretraining
    first = jnp.int32(0)
    update = make_client_update(
        apply_fn,
        task,
        local_optimizer(settings),
        settings.batch_size,
        steps=settings.steps,
    )

    def train(key: Array, params: Params, data: FederatedData) -> Params:
        result = update.train(key, whole_proxy(params, ()), data, first)
        return jax.tree.map(
            lambda old, delta: (old + delta).astype(old.dtype), params, result.delta
        )

    compiled = jax.jit(train)

    def pretrain(seed: int, params: Params, private: Batch) -> Params:
        if settings.steps == 0 or jax.tree.leaves(private)[0].shape[0] == 0:
            return params
        key = fold_in_name(root_key(with_fields(config, {"seed": seed})), "pretraining")
        return compiled(key, params, single_client(private))

    return pretrain
