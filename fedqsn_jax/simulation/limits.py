"""What a run holds beside its rounds: the server's own training, evaluations, reports.

All of it is estimated from shapes, and refused where it does not fit; see `problems.limits`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.trees import tree_bytes
from fedqsn_jax.core.types import Batch
from fedqsn_jax.problems.limits import check_memory
from fedqsn_jax.problems.training import local_optimizer
from fedqsn_jax.rounds.fine_tuning import COPIES
from fedqsn_jax.simulation.fitting import Model
from fedqsn_jax.simulation.memory import client_bytes, saved_activations


def check_population(config: Config, population: int) -> None:
    """Refuses cohorts and coalitions that are larger than the population.

    Raises:
      ConfigError: One is.
    """
    if config.cohort.size > population:
        raise ConfigError(
            f"cohort.size = {config.cohort.size}: allowed is at most {population}, the clients "
            f"that take part (data.clients without data.held_out_clients)"
        )
    for colluders in config.evaluation.attackers:
        if colluders > population:
            raise ConfigError(
                f"evaluation.attackers = {config.evaluation.attackers}: allowed is at most "
                f"{population} each, the clients that take part (data.clients without "
                f"data.held_out_clients)"
            )


def check_pretraining(config: Config, model: Model, private: Batch) -> None:
    """Makes sure that the server can train on its own rows.

    Args:
      config: The settings.
      model: The model; ``client_apply`` is what the server trains.
      private: The server's rows.

    Raises:
      ConfigError: It takes more memory than there is.
    """
    settings = config.pretraining
    if not settings.steps or not jax.tree.leaves(private)[0].shape[0]:
        return
    batch = _rows_of(private, settings.batch_size)
    apply_fn, task, params = model.client_apply, model.task, model.params
    training = client_bytes(apply_fn, task, local_optimizer(settings), params, batch)
    rows = tree_bytes(batch) + 2 * saved_activations(apply_fn, task, params, batch)
    # The parameters of the start stay, and the new ones are made beside the training's own.
    rest = 2 * tree_bytes(params) + training - rows
    check_memory(
        config,
        "the steps of the server's own training",
        {"pretraining.batch_size": rows, model.size: rest},
    )


def check_evaluation(config: Config, model: Model, rows: Batch, held: int) -> None:
    """Makes sure that views can be evaluated.

    Args:
      config: The settings.
      model: The model.
      rows: The test rows.
      held: Bytes that are held all the while, the server's state and the clients' rows.

    Raises:
      ConfigError: It takes more memory than there is.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    batch = _rows_of(rows, min(config.evaluation.batch_size, count))
    program = jax.make_jaxpr(lambda params, batch: model.apply_fn(params, batch, None))
    jaxpr = program(model.params, batch)
    # What a layer makes, and what it makes it of.
    forward = tree_bytes(batch) + 2 * _largest(jaxpr.jaxpr)
    check_memory(
        config,
        "evaluations",
        {
            "evaluation.batch_size": forward,
            "evaluation.proxy_samples": sample_bytes(config),
            model.size: held + 2 * tree_bytes(model.params) + tree_bytes(rows),
        },
    )


def check_trained_attackers(config: Config, model: Model, rows: Batch, held: int) -> None:
    """Makes sure that attackers can train what they hold.

    Args:
      config: The settings.
      model: The model.
      rows: The test rows, in the shapes of which are the attackers' own.
      held: Bytes that are held all the while, the server's state and the clients' rows.

    Raises:
      ConfigError: It takes more memory than there is.
    """
    batch = _rows_of(rows, config.client.batch_size)
    saved = saved_activations(model.client_apply, model.task, model.params, batch)
    check_memory(
        config,
        "the training of attackers (evaluation.fine_tuned_attackers)",
        {
            "client.batch_size": tree_bytes(batch) + 2 * saved,
            model.size: held + COPIES * tree_bytes(model.params),
        },
    )


def sample_bytes(config: Config) -> int:
    """Returns what the samples of the proxy view take: a key each, and its metrics."""
    return 24 * config.evaluation.proxy_samples


def report_bytes(config: Config, sites: int) -> int:
    """Returns what a call's reports take, on the device and on the host.

    Args:
      config: The settings.
      sites: Number of mask sites, of which columns are counted.
    """
    numbers = 2 * (3 + len(config.evaluation.attackers)) + 6 + 2 * sites
    # Twice on the device, as a loop carries them, and on the host.
    return 3 * 4 * numbers * config.rounds_per_call


def _rows_of(rows: Batch, count: int) -> Any:
    """The shapes of so many rows."""
    return {
        name: jax.ShapeDtypeStruct((count, *array.shape[1:]), array.dtype)
        for name, array in rows.items()
    }


def _largest(jaxpr: Any) -> int:
    """Bytes of the largest array that a program makes, those within its loops included."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape, dtype = (
                getattr(variable.aval, "shape", ()),
                getattr(variable.aval, "dtype", None),
            )
            if dtype is not None and not jnp.issubdtype(dtype, jax.dtypes.extended):
                largest = max(largest, math.prod(shape) * dtype.itemsize)
        for value in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(value):
                largest = max(largest, _largest(getattr(value, "jaxpr", value)))
    return largest


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
