"""A configured simulation: everything between a model with data and its rounds.

The main job and the call for a user's own model build the same thing here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedqsn_jax.config.schema import Config, chooses_scale
from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import TensorRoles, in_float32
from fedqsn_jax.core.types import ApplyFn, Key, Params
from fedqsn_jax.data.population import ClientData
from fedqsn_jax.models.functional import in_compute_dtype
from fedqsn_jax.problems.limits import MODEL
from fedqsn_jax.problems.training import local_optimizer
from fedqsn_jax.prompting.prompted_model import alternating, returning
from fedqsn_jax.protocol.algorithms import Algorithm
from fedqsn_jax.protocol.lora import Lora
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.sizes import Traffic, measure_traffic
from fedqsn_jax.rounds.calls import make_rounds
from fedqsn_jax.rounds.client import ClientUpdate, make_client_update
from fedqsn_jax.rounds.client_optimizer import ClientOptimizer, unscheduled
from fedqsn_jax.rounds.evaluation import make_client_evaluator, make_evaluator
from fedqsn_jax.rounds.federation import (
    Evaluation,
    Federation,
    ServerState,
    make_federation,
)
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.rounds.participation import Participation
from fedqsn_jax.simulation.accounting import Account, account_of
from fedqsn_jax.simulation.client_run import choose_client_run
from fedqsn_jax.simulation.fitting import Fitted, Model, fit
from fedqsn_jax.simulation.from_config import (
    SCALES,
    algorithm_of,
    cohort_places,
    configured_aggregator,
    configured_broadcast,
    configured_privacy,
    make_upload,
    upload_quantizer,
)
from fedqsn_jax.simulation.limits import check_population
from fedqsn_jax.simulation.scheduling import ClientAxisChoice

TRACEABLE = (
    "p1",
    "p2",
    "client.learning_rate",
    "client.weight_decay",
    "server.learning_rate",
)
"""Fields whose values a compiled round may take as arguments. A probability that is a number zero
is left out of the program; a traced one that is zero gives the same values."""


class Simulation(NamedTuple):
    """A method that fits a model and a population, ready to run.

    Attributes:
      config: Its settings.
      federation: Its pure functions; its ``init`` takes the plain model's parameters, and adds
        adapters.
      algorithm: What clients receive.
      method: The parts of the federation: mask sites, those of adapters included, which tensors go
        where, and what becomes of the deltas.
      lora: The adapters, or None.
      traffic: The lengths of payloads.
      choice: How the client axis is run, and why.
      memory: Estimated bytes on a device during a round, by purpose.
      task: What the model is for.
      population: Number of clients.
      account: What clients' privacy costs; None: nothing is private.
      run: Several rounds in one compiled call; see `calls.make_rounds`.
      recompose: ``config -> Simulation``: the same with other values of `TRACEABLE` fields. They
        may be traced scalars, so that one compiled program serves many values.
    """

    config: Config
    federation: Federation
    algorithm: Algorithm
    method: Method
    lora: Lora | None
    traffic: Traffic
    choice: ClientAxisChoice
    memory: dict[str, int]
    task: Task
    population: int
    account: Account | None
    run: Callable[..., Any]
    recompose: Callable[[Config], "Simulation"]

    @property
    def sites(self) -> Sites:
        """The mask sites."""
        return self.method.sites

    @property
    def roles(self) -> TensorRoles:
        """Which tensors go where."""
        return self.method.roles

    @property
    def held_bytes(self) -> int:
        """What a device holds all the while by the estimate: the server's state, clients' rows."""
        always = ("server's state", "clients' rows")
        return sum(count for purpose, count in self.memory.items() if purpose.startswith(always))

    def merged(self, params: Params) -> Params:
        """Returns the plain model's parameters: adapters are merged into their matrices."""
        return params if self.lora is None else self.lora.merge(params)


def make_simulation(
    config: Config,
    apply_fn: ApplyFn,
    task: Task,
    params: Params,
    data: ClientData,
    client_apply: ApplyFn | None = None,
    *,
    size: str = MODEL,
    noise: float | None = None,
) -> Simulation:
    """Composes a simulation.

    Args:
      config: The settings; ``data``, ``model`` and ``checkpoint`` play no part.
      apply_fn: The model.
      task: What it is for.
      params: Its parameters, or their shapes, without adapters.
      data: The population; of its rows only their numbers, shapes and dtypes matter.
      client_apply: The model as clients train it; by default ``apply_fn`` in
        ``client.compute_dtype``.
      size: The setting that decides on the model's size, to be named where it is too large.
      noise: The noise multiplier that was found for ``privacy.epsilon``; None: it is found now.

    Raises:
      ConfigError: The settings do not fit the model, the population or the device.
    """
    check_population(config, data.clients)
    places = cohort_places(config, data.clients)
    account = account_of(config, data.clients, places, noise)
    algorithm = algorithm_of(config)
    model = Model(
        apply_fn=apply_fn,
        client_apply=client_apply or in_compute_dtype(apply_fn, config.client.compute_dtype),
        task=task,
        # What is kept for other settings holds no arrays.
        params=jax.eval_shape(lambda tree: tree, params),
        size=size,
    )
    fitted = fit(config, algorithm, model, _batch_shapes(data, config.client.batch_size))
    parts = _compose(config, algorithm, fitted, data.clients, account)
    memory, choice = choose_client_run(config, fitted, parts, data, _optimizer(config, algorithm))
    return _simulation(config, fitted, parts, choice=choice, memory=memory)


class _Parts(NamedTuple):
    """What one configuration makes of what `fit` gave.

    Attributes:
      algorithm: What clients receive.
      method: All that happens in a round.
      federation: The same composed, its clients one after the other.
      traffic: The lengths of payloads.
      population: Number of clients.
      account: What clients' privacy costs, or None.
    """

    algorithm: Algorithm
    method: Method
    federation: Federation
    traffic: Traffic
    population: int
    account: Account | None


def _compose(
    config: Config,
    algorithm: Algorithm,
    fitted: Fitted,
    population: int,
    account: Account | None,
) -> _Parts:
    sites, roles, task = fitted.sites, fitted.roles, fitted.model.task
    method = Method(
        transform=algorithm.transform,
        update=_client_update(config, algorithm, fitted),
        aggregator=configured_aggregator(config, sites, roles.returned),
        sites=sites,
        roles=roles,
        upload=make_upload(config, sites, roles.returned),
        participation=Participation(**dataclasses.asdict(config.participation)),
        broadcast=configured_broadcast(config, algorithm),
        mask_per=config.mask_per,  # type: ignore[arg-type]
        privacy=configured_privacy(config, algorithm, account),
        stored=fitted.stored,
    )
    apply_fn, rows = fitted.model.apply_fn, config.evaluation.batch_size
    evaluation = Evaluation(
        evaluator=make_evaluator(apply_fn, task, rows),
        score=task.score,
        proxy_samples=config.evaluation.proxy_samples,
        attackers=config.evaluation.attackers,
        client_evaluator=make_client_evaluator(apply_fn, task, rows),
        scales=SCALES if chooses_scale(config) else (),
    )
    federation = make_federation(
        method,
        evaluation,
        population=population,
        cohort=config.cohort.size,
        sampling=config.cohort.sampling,  # type: ignore[arg-type]
    )
    traffic = measure_traffic(
        algorithm.transform,
        fitted.model.params,
        sites,
        sent=roles.sent,
        trained=roles.returned,
        plain=fitted.reference,
        upload=upload_quantizer(config),
    )
    federation = _from_plain_model(federation, fitted.lora, roles)
    return _Parts(
        algorithm=algorithm,
        method=method,
        federation=federation,
        traffic=traffic,
        population=population,
        account=account,
    )


def _simulation(
    config: Config,
    fitted: Fitted,
    parts: _Parts,
    choice: ClientAxisChoice,
    memory: dict[str, int],
) -> Simulation:
    def recompose(config: Config) -> Simulation:
        again = _compose(config, algorithm_of(config), fitted, parts.population, parts.account)
        return _simulation(config, fitted, again, choice=choice, memory=memory)

    federation = parts.federation.with_client_axis(choice.axis)
    return Simulation(
        config=config,
        federation=federation,
        algorithm=parts.algorithm,
        method=parts.method,
        lora=fitted.lora,
        traffic=parts.traffic,
        choice=choice,
        memory=memory,
        task=fitted.model.task,
        population=parts.population,
        account=parts.account,
        run=make_rounds(
            federation,
            rounds_per_call=config.rounds_per_call,
            evaluate_every=config.evaluation.every,
        ),
        recompose=recompose,
    )


def _optimizer(config: Config, algorithm: Algorithm) -> ClientOptimizer:
    own = local_optimizer(config.client)
    if not algorithm.prompts_only:
        return own
    of_layers = unscheduled(optax.adam(config.fedsp.auxiliary_rate))
    return alternating(of_layers, own, config.fedsp.auxiliary_share)


def _client_update(config: Config, algorithm: Algorithm, fitted: Fitted) -> ClientUpdate:
    update = make_client_update(
        fitted.model.client_apply,
        fitted.model.task,
        _optimizer(config, algorithm),
        batch_size=config.client.batch_size,
        steps=config.client.steps,
        epochs=config.client.epochs,
        trained=fitted.roles.trained,
        proximal=config.client.proximal,
    )
    return returning(update, fitted.roles.returned) if algorithm.prompts_only else update


def _from_plain_model(federation: Federation, lora: Lora | None, roles: TensorRoles) -> Federation:
    """The same, starting from the plain model's parameters, which may be stored narrow."""

    def init(key: Key, params: Params) -> ServerState:
        if lora is not None:
            params = lora.add(fold_in_name(fold_in_name(key, "secret"), "adapters"), params)
        return federation.init(key, in_float32(params, roles.trained))

    return federation._replace(init=init)


def _batch_shapes(data: ClientData, batch_size: int) -> Any:
    first, one = jnp.int32(0), jnp.zeros(1, jnp.int32)
    row = jax.eval_shape(lambda: data.gather(first, one))
    return {
        name: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in row.items()
    }
