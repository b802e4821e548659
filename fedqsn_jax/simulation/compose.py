"""A configured simulation: everything between a model with data and its rounds.

The main job and the call for a user's own model build the same thing here.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import (
    Selection,
    TensorRoles,
    exclude,
    select,
    select_trained,
    tree_bytes,
)
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.data.population import ClientData
from fedqsn_jax.host.devices import device_bytes
from fedqsn_jax.models.functional import in_compute_dtype
from fedqsn_jax.problems.training import local_optimizer
from fedqsn_jax.prompting.prompted_model import alternating, full_encoder, parts_of, returning
from fedqsn_jax.protocol.algorithms import Algorithm
from fedqsn_jax.protocol.lora import Lora
from fedqsn_jax.protocol.low_rank import adapt
from fedqsn_jax.protocol.sites import Sites, embedding_rules, find_sites
from fedqsn_jax.protocol.sizes import Traffic, measure_traffic
from fedqsn_jax.rounds.aggregation import Aggregator, make_aggregator
from fedqsn_jax.rounds.client import ClientUpdate, make_client_update
from fedqsn_jax.rounds.client_axis import ClientAxis
from fedqsn_jax.rounds.client_evaluation import make_client_evaluator
from fedqsn_jax.rounds.client_optimizer import ClientOptimizer, unscheduled
from fedqsn_jax.rounds.evaluation import make_evaluator
from fedqsn_jax.rounds.federation import (
    Federation,
    ServerState,
    make_federation,
    make_rounds,
)
from fedqsn_jax.rounds.participation import Participation
from fedqsn_jax.simulation.configured import (
    algorithm_of,
    configured_adapters,
    make_upload,
    server_optimizer,
    upload_quantizer,
)
from fedqsn_jax.simulation.memory import client_bytes
from fedqsn_jax.simulation.parallelism import ClientAxisChoice, Workload, choose_client_axis
from fedqsn_jax.simulation.round_memory import fixed_memory, own_frozen_bytes, proxy_and_deltas

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
      aggregator: What becomes of the deltas.
      sites: The mask sites, those of adapters included.
      lora: The adapters, or None.
      trained: The tensors that clients train.
      returned: Those of them that travel back, and that the server changes.
      sent: The tensors that travel to clients.
      withheld: Those that nobody but the server has.
      traffic: The lengths of payloads.
      choice: How the client axis is run, and why.
      memory: Estimated bytes on a device during a round, by purpose.
      task: What the model is for.
      run: Several rounds in one compiled call; see `rounds.make_rounds`.
      recompose: ``config -> Simulation``: the same with other values of `TRACEABLE` fields. They
        may be traced scalars, so that one compiled program serves many values.
    """

    config: Config
    federation: Federation
    algorithm: Algorithm
    aggregator: Aggregator
    sites: Sites
    lora: Lora | None
    trained: Selection
    returned: Selection
    sent: Selection
    withheld: Selection
    traffic: Traffic
    choice: ClientAxisChoice
    memory: dict[str, int]
    task: Task
    run: Callable[..., Any]
    recompose: Callable[[Config], "Simulation"]

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

    Raises:
      ConfigError: The settings do not fit the model, the population or the device.
    """
    population = data.clients
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
    algorithm = algorithm_of(config)
    try:
        embeddings = embedding_rules(params) if config.quantize_embeddings else ()
        rules = (*config.site_rules, *embeddings)
        sites = find_sites(params, rules, config.sites)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"site_rules: {error}") from error
    plain, reference, lora, merged = params, params, configured_adapters(config, params), None
    batch = _batch_shapes(data, config.client.batch_size)
    local_apply = client_apply or in_compute_dtype(apply_fn, config.client.compute_dtype)
    adapters_only = algorithm.adapters_only
    public = adapters_only or config.lora.public_base
    if lora is not None:
        params = jax.eval_shape(lora.add, jax.random.key(0), params)
        apply_fn, _ = adapt(lora, apply_fn, params, batch)
        local_apply, merged = adapt(lora, local_apply, params, batch)
        quantize = config.lora.quantize or adapters_only
        sites = lora.sites(sites, quantize=quantize, public=public, flat=adapters_only)
    try:
        trained = select_trained(params, config.client.trained or ("lora" if lora else "all",))
    except ValueError as error:
        raise ConfigError(f"client.trained: {error}") from error
    parts = TensorRoles(sent=trained if public else None, trained=trained, returned=trained)
    if algorithm.prompts_only:
        parts = parts_of(params, config.fedsp.tuned, auxiliary=config.fedsp.auxiliary_share > 0)
        sites, reference = (), full_encoder(params)
    sent, trained, returned, withheld = parts
    # What is kept for other settings holds no arrays.
    params, plain, reference = jax.eval_shape(lambda *trees: trees, params, plain, reference)

    def optimizer_of(config: Config) -> ClientOptimizer:
        own = local_optimizer(config.client)
        if not algorithm.prompts_only:
            return own
        of_layers = unscheduled(optax.adam(config.fedsp.auxiliary_rate))
        return alternating(of_layers, own, config.fedsp.auxiliary_share)

    def update_of(config: Config) -> ClientUpdate:
        update = make_client_update(
            local_apply,
            task,
            optimizer_of(config),
            config.client.batch_size,
            steps=config.client.steps,
            epochs=config.client.epochs,
            trained=trained,
            proximal=config.client.proximal,
        )
        return returning(update, returned) if algorithm.prompts_only else update

    def traffic_of(config: Config) -> Traffic:
        return measure_traffic(
            algorithm_of(config).transform,
            params,
            sites,
            sent=sent,
            trained=returned,
            plain=reference,
            upload=upload_quantizer(config),
        )

    def compose(config: Config, choice: ClientAxisChoice, memory: dict[str, int]) -> Simulation:
        algorithm = algorithm_of(config)
        aggregator = make_aggregator(
            sites,
            server_optimizer(config.server, config.rounds),
            weighting=config.server.weighting,  # type: ignore[arg-type]
            normalize=config.server.normalize,  # type: ignore[arg-type]
            rule=config.server.rule,  # type: ignore[arg-type]
            trained=returned,
            clip_norm=config.server.clip_norm,
        )
        federation = make_federation(
            algorithm.transform,
            update_of(config),
            aggregator,
            make_evaluator(apply_fn, task, config.evaluation.batch_size),
            sites,
            population=population,
            cohort=config.cohort.size,
            client_axis=choice.axis,
            proxy_samples=config.evaluation.proxy_samples,
            attackers=config.evaluation.attackers,
            score=task.score,
            sent=sent,
            withheld=withheld,
            participation=Participation(**dataclasses.asdict(config.participation)),
            upload=make_upload(config, sites, returned),
            client_evaluator=make_client_evaluator(apply_fn, task, config.evaluation.batch_size),
        )
        if lora is not None:
            federation = _with_adapters(federation, lora)
        run = make_rounds(
            federation,
            rounds_per_call=config.rounds_per_call,
            evaluate_every=config.evaluation.every,
        )
        return Simulation(
            config,
            federation,
            algorithm,
            aggregator,
            sites,
            lora,
            trained,
            returned,
            sent,
            withheld,
            traffic_of(config),
            choice,
            memory,
            task,
            run,
            lambda config: compose(config, choice, memory),
        )

    one_by_one = compose(config, ClientAxisChoice(ClientAxis(), ""), {})
    # What it has not got, it does not compute with either.
    a_client = client_bytes(
        local_apply,
        task,
        optimizer_of(config),
        exclude(params, withheld),
        batch,
        trained=trained,
        proximal=config.client.proximal,
    )
    frozen = own_frozen_bytes(params, sites, trained, one_by_one.traffic)
    # Twice, as was measured: the compiler does not overwrite them in place. And a merged matrix
    # with its gradient.
    a_client += 2 * frozen
    an_arrival = tree_bytes(select(params, trained)) + frozen
    a_client += sum(8 * math.prod(one.matrix.shape) for one in merged.adapters) if merged else 0
    fixed = {
        **proxy_and_deltas(select(params, sent), select(params, returned)),
        **fixed_memory(one_by_one.federation, plain, sites, config, data),
    }
    steps = update_of(config).step_count(data.rows(_some_clients(population)))
    workload = Workload(
        steps=np.asarray(steps),
        equal_steps=0 if config.participation.stragglers else config.client.steps,
        client_bytes=a_client,
        arrival_bytes=an_arrival,
        fixed_bytes=sum(fixed.values()),
        device_bytes=device_bytes(),
    )
    choice = choose_client_axis(config.cohort, workload, jax.default_backend())
    at_once, refills = choice.axis.chunk_size, choice.axis.refills
    memory = {**fixed, f"training of {at_once} client(s) at once": at_once * a_client}
    if at_once > 1:
        memory["clients that come and go"] = refills * an_arrival
    return compose(config, choice, memory)


def _with_adapters(federation: Federation, lora: Lora) -> Federation:
    """The same, starting from the plain model's parameters."""

    def init(key: Key, params: Params) -> ServerState:
        adapter_key = fold_in_name(fold_in_name(key, "secret"), "adapters")
        return federation.init(key, lora.add(adapter_key, params))

    return federation._replace(init=init)


def _some_clients(population: int) -> Array:
    """Ids of all clients, or of some thousand evenly spread ones."""
    count = min(population, 4096)
    return jnp.asarray(np.arange(count, dtype=np.int64) * population // count, jnp.int32)


def _batch_shapes(data: ClientData, batch_size: int) -> Batch:
    first, indices = jnp.int32(0), jnp.zeros(batch_size, jnp.int32)
    return jax.eval_shape(lambda: data.gather(first, indices))
