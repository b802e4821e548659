"""A configured simulation: everything between a model with data and its rounds.

The main job and the call for a user's own model build the same thing here.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedqsn_jax.aggregation import Aggregator, make_aggregator
from fedqsn_jax.algorithms import Algorithm, make_algorithm
from fedqsn_jax.client import make_client_update
from fedqsn_jax.client_metrics import make_client_evaluator
from fedqsn_jax.client_optimizer import ClientOptimizer, unscheduled
from fedqsn_jax.cohort import ClientAxis
from fedqsn_jax.config import ClientConfig, Config, ConfigError, ServerConfig
from fedqsn_jax.data.federated import ClientData, FederatedData, single_client
from fedqsn_jax.data.held_out import HeldOut
from fedqsn_jax.data.streamed import HostData, capacity_for, stream
from fedqsn_jax.masking import Sites, find_sites
from fedqsn_jax.memory import client_bytes, device_bytes, tree_bytes
from fedqsn_jax.metrics import make_evaluator
from fedqsn_jax.models.adapters import in_compute_dtype
from fedqsn_jax.parallelism import Choice, Workload, choose_client_axis
from fedqsn_jax.participation import Participation
from fedqsn_jax.placement import Tree, replicate
from fedqsn_jax.proxy import whole_proxy
from fedqsn_jax.quantization import NormalFloat, Quantizer, SymmetricNormalFloat, Uniform
from fedqsn_jax.randomness import fold_in_name
from fedqsn_jax.rounds import (
    Federation,
    ServerState,
    draw_cohorts,
    make_federation,
    make_rounds,
)
from fedqsn_jax.tasks import Task
from fedqsn_jax.traffic import Traffic, measure_traffic
from fedqsn_jax.types import ApplyFn, Array, Batch, Params
from fedqsn_jax.upload import quantized_upload

Entry = dict[str, Any]
"""One evaluated round: what becomes a line of metrics.jsonl."""


class Simulation(NamedTuple):
    """A method that fits a model and a population, ready to run.

    Attributes:
      config: Its settings.
      federation: Its pure functions.
      algorithm: What clients receive.
      aggregator: What becomes of the deltas.
      sites: The model's mask sites.
      traffic: The lengths of payloads.
      choice: How the client axis is run, and why.
      memory: Estimated bytes on a device during a round, by purpose.
      task: What the model is for.
      run: Several rounds in one compiled call; see `rounds.make_rounds`.
    """

    config: Config
    federation: Federation
    algorithm: Algorithm
    aggregator: Aggregator
    sites: Sites
    traffic: Traffic
    choice: Choice
    memory: dict[str, int]
    task: Task
    run: Callable[..., Any]


def make_simulation(
    config: Config, apply_fn: ApplyFn, task: Task, params: Params, data: ClientData
) -> Simulation:
    """Composes a simulation.

    Args:
      config: The settings; ``data``, ``model`` and ``checkpoint`` play no part.
      apply_fn: The model.
      task: What it is for.
      params: Its parameters, or their shapes.
      data: The population; of its rows only their numbers, shapes and dtypes matter.

    Raises:
      ConfigError: The settings do not fit the model, the population or the device.
    """
    population = data.clients
    if config.cohort.size > population:
        raise ConfigError(
            f"cohort.size = {config.cohort.size}: allowed is at most the population, {population}"
        )
    for colluders in config.evaluation.attackers:
        if colluders > population:
            raise ConfigError(
                f"evaluation.attackers = {config.evaluation.attackers}: allowed is at most the "
                f"population, {population}"
            )
    try:
        sites = find_sites(params, config.site_rules, config.sites)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"site_rules: {error}") from error
    algorithm = make_algorithm(
        config.algorithm,
        make_quantizer(config),
        config.p1,
        config.p2,
        config.sampling,  # type: ignore[arg-type]
    )
    optimizer = client_optimizer(config.client)
    local_apply = in_compute_dtype(apply_fn, config.client.compute_dtype)
    update = make_client_update(
        local_apply,
        task,
        optimizer,
        config.client.batch_size,
        steps=config.client.steps,
        epochs=config.client.epochs,
        proximal=config.client.proximal,
    )
    upload_quantizer = _upload_quantizer(config)
    upload = None
    if upload_quantizer is not None:
        feedback = config.upload.error_feedback
        upload = quantized_upload(upload_quantizer, sites, feedback=feedback)
    aggregator = make_aggregator(
        sites,
        _server_optimizer(config.server),
        weighting=config.server.weighting,  # type: ignore[arg-type]
        normalize=config.server.normalize,  # type: ignore[arg-type]
        clip_norm=config.server.clip_norm,
    )
    federation_of = functools.partial(
        make_federation,
        algorithm.transform,
        update,
        aggregator,
        make_evaluator(apply_fn, task, config.evaluation.batch_size),
        sites,
        population=population,
        cohort=config.cohort.size,
        proxy_samples=config.evaluation.proxy_samples,
        attackers=config.evaluation.attackers,
        score=task.score,
        participation=Participation(**dataclasses.asdict(config.participation)),
        upload=upload,
        client_evaluator=make_client_evaluator(apply_fn, task, config.evaluation.batch_size),
    )
    batch = _batch_shapes(data, config.client.batch_size)
    a_client = client_bytes(local_apply, task, optimizer, params, batch, config.client.proximal)
    fixed = _fixed_memory(federation_of(client_axis=ClientAxis()), params, sites, config, data)
    steps = update.step_count(data.rows(_some_clients(population)))
    workload = Workload(
        steps=np.asarray(steps),
        equal_steps=0 if config.participation.stragglers else config.client.steps,
        client_bytes=a_client,
        fixed_bytes=sum(fixed.values()),
        device_bytes=device_bytes(),
    )
    choice = choose_client_axis(config.cohort, workload, jax.default_backend())
    at_once, refills = choice.axis.chunk_size, choice.axis.refills
    memory = {**fixed, f"training of {at_once} client(s) at once": at_once * a_client}
    if at_once > 1:
        memory["clients that come and go"] = refills * tree_bytes(params)
    federation = federation_of(client_axis=choice.axis)
    run = make_rounds(
        federation,
        rounds_per_call=config.rounds_per_call,
        evaluate_every=config.evaluation.every,
    )
    traffic = measure_traffic(algorithm.transform, params, sites, upload_quantizer)
    return Simulation(
        config, federation, algorithm, aggregator, sites, traffic, choice, memory, task, run
    )


def _some_clients(population: int) -> Array:
    """Ids of all clients, or of some thousand evenly spread ones."""
    count = min(population, 4096)
    return jnp.asarray(np.arange(count, dtype=np.int64) * population // count, jnp.int32)


def _batch_shapes(data: ClientData, batch_size: int) -> Batch:
    first, indices = jnp.int32(0), jnp.zeros(batch_size, jnp.int32)
    return jax.eval_shape(lambda: data.gather(first, indices))


def _fixed_memory(
    federation: Federation, params: Params, sites: Sites, config: Config, data: ClientData
) -> dict[str, int]:
    """What a device holds during a round whatever the chunk, bytes by purpose."""
    state = jax.eval_shape(federation.init, jax.random.key(0), params)
    model = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    columns = sum(site.layers * site.columns for site in sites if site.hideable)
    residuals = tree_bytes(state.residuals)
    own = {}
    if residuals:
        own = {"residuals of all clients": residuals}
        own["residuals of the cohort"] = residuals // data.clients * config.cohort.size
    if sum(own.values()) > device_bytes():
        raise ConfigError(
            f"upload.error_feedback = True: residuals of {data.clients} clients take "
            f"{sum(own.values()) / 2**30:.1f} GiB, a device has {device_bytes() / 2**30:.1f} GiB; "
            f"allowed is False, or fewer clients"
        )
    return {
        "server's state with attackers' copies": tree_bytes(state) - residuals,
        **own,
        "dequantized proxy of the round": model,
        "sum of deltas": model,
        "client masks": config.cohort.size * columns,
        **_rows_memory(federation, params, config, data),
    }


def _rows_memory(
    federation: Federation, params: Params, config: Config, data: ClientData
) -> dict[str, int]:
    if not isinstance(data, HostData):
        return {"clients' rows": data.device_bytes}

    def public_key(key: Array) -> Array:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        return federation.init(key, zeros).public_key

    key = _federation_key(config)
    state = dataclasses.replace(
        jax.eval_shape(federation.init, key, params), public_key=jax.jit(public_key)(key)
    )
    cohorts = draw_cohorts(federation, state, config.rounds)
    calls = [cohorts[start:stop] for start, stop in _calls(0, config)]
    needed, available = 2 * capacity_for(data, calls).device_bytes(data), device_bytes()
    if needed > available:
        raise ConfigError(
            f"rounds_per_call = {config.rounds_per_call}: the clients' rows of two calls take "
            f"{needed / 2**30:.1f} GiB, a device has {available / 2**30:.1f} GiB; allowed is less, "
            f"or a smaller cohort.size"
        )
    return {"clients' rows of two calls": needed}


def _calls(finished: int, config: Config) -> list[tuple[int, int]]:
    """The calls that are left: numbers of rounds that are finished before and after each."""
    per_call = config.rounds_per_call
    boundaries = range((finished // per_call + 1) * per_call, config.rounds, per_call)
    ends = [*boundaries, config.rounds]
    return list(zip([finished, *ends], ends, strict=False)) if finished < config.rounds else []


def make_quantizer(config: Config) -> Quantizer:
    """Returns the quantizer that a configuration names."""
    kind = _CODEBOOKS[config.codebook]
    return kind(config.bits, config.block_size, blocks_along=config.blocks)


def _upload_quantizer(config: Config) -> Quantizer | None:
    settings = config.upload
    if not settings.bits:
        return None
    return _CODEBOOKS[settings.codebook](settings.bits, settings.block_size)


_CODEBOOKS: dict[str, type[Quantizer]] = {
    "normal_float": NormalFloat,
    "symmetric_normal_float": SymmetricNormalFloat,
    "uniform": Uniform,
}


def pretrain(
    config: Config, apply_fn: ApplyFn, task: Task, params: Params, private: Batch
) -> Params:
    """The server's own training on its private rows, by plain SGD; without rows, none.

    Args:
      config: The settings: ``pretraining`` and the seed.
      apply_fn: The model, with the dropout of pre-training.
      task: Its loss.
      params: Its initial parameters.
      private: The server's rows.
    """
    settings = config.pretraining
    data = single_client(private)
    first = jnp.int32(0)
    update = make_client_update(
        apply_fn,
        task,
        unscheduled(optax.sgd(settings.learning_rate)),
        settings.batch_size,
        steps=settings.steps,
    )

    def train(key: Array, params: Params, data: FederatedData) -> Params:
        result = update.train(key, whole_proxy(params, ()), data, first)
        return jax.tree.map(
            lambda old, delta: (old + delta).astype(old.dtype), params, result.delta
        )

    if settings.steps == 0 or jax.tree.leaves(private)[0].shape[0] == 0:
        return params
    return jax.jit(train)(fold_in_name(root_key(config), "pretraining"), params, data)


def root_key(config: Config) -> Array:
    """Returns the key from which everything in a run is drawn."""
    return jax.random.key(np.uint32(config.seed))


def place(simulation: Simulation, tree: Tree) -> Tree:
    """Puts a state or data where the simulation's calls want them; see `placement.replicate`."""
    return replicate(tree, simulation.choice.axis.mesh)


def initial_state(simulation: Simulation, params: Params) -> ServerState:
    """Returns the state before the first round, in its place; the parameters are copied."""
    init = jax.jit(simulation.federation.init)
    return place(simulation, init(_federation_key(simulation.config), params))


def _federation_key(config: Config) -> Array:
    return fold_in_name(root_key(config), "federation")


def first_entry(simulation: Simulation, state: ServerState, test: Batch | HeldOut) -> Entry:
    """Evaluates the state before the first round: an entry without training facts."""
    test = place(simulation, test)
    metrics = jax.device_get(jax.jit(simulation.federation.evaluate)(state, test))
    return {"round": 0, **_ordered(metrics), "seconds": 0.0}


def run_rounds(
    simulation: Simulation,
    state: ServerState,
    data: ClientData,
    test: Batch | HeldOut,
    *,
    seconds: float = 0.0,
) -> Iterator[tuple[int, ServerState, list[Entry]]]:
    """Runs rounds up to the configured number, call by call.

    Calls end at multiples of ``rounds_per_call`` of the absolute round, so that an interrupted run
    and an uninterrupted one make the same calls. A yielded state is donated to the next call: use
    it before asking for the next.

    Args:
      simulation: What to run.
      state: The state to start from, in its place (see `place`); it is donated.
      data: The clients' rows. Those of `HostData` are streamed: while the device works on a call,
        the rows of the next are gathered and sent.
      test: Held-out rows, also of clients.
      seconds: What earlier parts of the run took; entries count on from there.

    Yields:
      ``(round, state, entries)`` after each call, with the rounds evaluated in it.
    """
    config = simulation.config
    calls = _calls(int(state.round), config)
    test, last = place(simulation, (test, jnp.int32(config.rounds)))
    feed = _feed(simulation, state, data, calls)
    began = time.perf_counter()
    rows = next(feed, None)
    for finished, stop in calls:
        until = place(simulation, jnp.int32(stop))
        state, result = simulation.run(state, rows, test, until, last)
        # The call runs on while the host prepares the next one's rows.
        rows = next(feed, None)
        facts, metrics, evaluated = jax.device_get(result)
        took = time.perf_counter() - began
        entries = []
        for index in np.flatnonzero(evaluated[: stop - finished]):
            share = (index + 1) / (stop - finished)
            one = {name: values[index] for name, values in metrics.items()}
            entries.append(
                {
                    "round": finished + int(index) + 1,
                    **_ordered(one),
                    **_facts_of(simulation, {name: x[index] for name, x in facts.items()}),
                    "seconds": round(float(seconds + share * took), 6),
                }
            )
        seconds += took
        yield stop, state, entries
        began = time.perf_counter()


def _facts_of(simulation: Simulation, facts: dict[str, Any]) -> Entry:
    """What a round's facts say: loss, who returned, and bytes, means over the sampled clients."""
    cohort, traffic = simulation.config.cohort.size, simulation.traffic

    def columns(kind: str) -> dict[str, float]:
        of_kind = (name for name in facts if name.startswith(f"{kind}/"))
        return {name.partition("/")[2]: int(facts[name]) / cohort for name in of_kind}

    counts = {name: int(facts[f"clients/{name}"]) for name in ("returned", "rejected")}
    return {
        "train/loss": float(facts["train/loss"]),
        **{f"clients/{name}": count for name, count in counts.items()},
        "bytes/down_per_client": traffic.down.of(columns("visible")),
        "bytes/up_per_client": traffic.up.of(columns("returned"), counts["returned"] / cohort),
    }


def _feed(
    simulation: Simulation, state: ServerState, data: ClientData, calls: list[tuple[int, int]]
) -> Iterator[ClientData]:
    """The rows for one call after the other."""
    if not isinstance(data, HostData):
        yield from itertools.repeat(place(simulation, data), len(calls))
        return
    cohorts = draw_cohorts(simulation.federation, state, simulation.config.rounds)
    # Of all the run's calls, so that a run that was interrupted goes on with the same program.
    every_call = [cohorts[start:stop] for start, stop in _calls(0, simulation.config)]
    capacity = capacity_for(data, every_call)
    for start, stop in calls:
        yield place(simulation, stream(data, cohorts[start:stop], capacity))


def _ordered(metrics: dict[str, Any]) -> dict[str, float]:
    """Puts the views in the order in which people read them; jitted functions sort by name."""
    views = ["global", "server", "proxy"]
    rank = {view: position for position, view in enumerate(views)}

    def place(name: str) -> tuple[str, int, int, str]:
        *group, view, metric = name.rsplit("/", 2)
        digits = "".join(filter(str.isdigit, view))
        return "/".join(group), rank.get(view, len(views)), int(digits or 0), metric

    return {name: float(metrics[name]) for name in sorted(metrics, key=place)}


def client_optimizer(settings: ClientConfig) -> ClientOptimizer:
    """Returns the optimizer of local training."""
    makers = {
        "sgd": lambda: optax.sgd(settings.learning_rate, settings.momentum or None),
        "adam": lambda: optax.adam(settings.learning_rate),
        "adamw": lambda: optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay),
    }
    return unscheduled(makers[settings.optimizer]())


def _server_optimizer(settings: ServerConfig) -> optax.GradientTransformation:
    makers = {
        "sgd": lambda: optax.sgd(settings.learning_rate, settings.momentum or None),
        "adagrad": lambda: optax.adagrad(settings.learning_rate),
        "adam": lambda: optax.adam(settings.learning_rate),
        "yogi": lambda: optax.yogi(settings.learning_rate),
        "lamb": lambda: optax.lamb(settings.learning_rate),
        "adafactor": lambda: optax.adafactor(settings.learning_rate),
    }
    return makers[settings.optimizer]()
