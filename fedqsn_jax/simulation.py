"""A configured simulation: everything between a model with data and its rounds.

The main job and the call for a user's own model build the same thing here.
"""

import dataclasses
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
from fedqsn_jax.client import ClientUpdate, make_client_update
from fedqsn_jax.client_metrics import make_client_evaluator
from fedqsn_jax.client_optimizer import ADAMW_EPSILON, ClientOptimizer, scheduled
from fedqsn_jax.cohort import ClientAxis
from fedqsn_jax.config import Config, ConfigError, ServerConfig, TrainingConfig, with_fields
from fedqsn_jax.data.federated import ClientData, FederatedData, single_client
from fedqsn_jax.data.held_out import HeldOut
from fedqsn_jax.data.streamed import HostData, capacity_for, stream
from fedqsn_jax.lora import Lora, configured_adapters
from fedqsn_jax.low_rank import adapt
from fedqsn_jax.masking import Sites, embedding_rules, find_sites
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
    CallResult,
    Federation,
    ServerState,
    draw_cohorts,
    make_federation,
    make_rounds,
)
from fedqsn_jax.tasks import Task
from fedqsn_jax.traffic import Traffic, measure_traffic
from fedqsn_jax.trainable import Selection, drop, keep, select_trained
from fedqsn_jax.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.upload import Upload, quantized_upload

TRACEABLE = (
    "p1",
    "p2",
    "client.learning_rate",
    "client.weight_decay",
    "server.learning_rate",
)
"""Fields whose values a compiled round may take as arguments. A probability that is a number zero
is left out of the program; a traced one that is zero gives the same values."""

Entry = dict[str, Any]
"""One evaluated round: what becomes a line of metrics.jsonl."""


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
      trained: The tensors that are trained.
      sent: The tensors that travel to clients.
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
    sent: Selection
    traffic: Traffic
    choice: Choice
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
            f"cohort.size = {config.cohort.size}: allowed is at most the population, {population}"
        )
    for colluders in config.evaluation.attackers:
        if colluders > population:
            raise ConfigError(
                f"evaluation.attackers = {config.evaluation.attackers}: allowed is at most the "
                f"population, {population}"
            )
    try:
        embeddings = embedding_rules(params) if config.quantize_embeddings else ()
        rules = (*config.site_rules, *embeddings)
        sites = find_sites(params, rules, config.sites)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"site_rules: {error}") from error
    plain, lora, merged = params, configured_adapters(config, params), None
    batch = _batch_shapes(data, config.client.batch_size)
    local_apply = client_apply or in_compute_dtype(apply_fn, config.client.compute_dtype)
    adapters_only = algorithm_of(config).adapters_only
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
    sent = trained if public else None
    # What is kept for other settings holds no arrays.
    params, plain = jax.eval_shape(lambda *trees: trees, params, plain)

    def update_of(config: Config) -> ClientUpdate:
        return make_client_update(
            local_apply,
            task,
            local_optimizer(config.client),
            config.client.batch_size,
            steps=config.client.steps,
            epochs=config.client.epochs,
            trained=trained,
            proximal=config.client.proximal,
        )

    def traffic_of(config: Config) -> Traffic:
        return measure_traffic(
            algorithm_of(config).transform,
            params,
            sites,
            sent=sent,
            trained=trained,
            plain=plain,
            upload=_upload_quantizer(config),
        )

    def compose(config: Config, choice: Choice, memory: dict[str, int]) -> Simulation:
        algorithm = algorithm_of(config)
        aggregator = make_aggregator(
            sites,
            server_optimizer(config.server, config.rounds),
            weighting=config.server.weighting,  # type: ignore[arg-type]
            normalize=config.server.normalize,  # type: ignore[arg-type]
            rule=config.server.rule,  # type: ignore[arg-type]
            trained=trained,
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
            participation=Participation(**dataclasses.asdict(config.participation)),
            upload=_upload(config, sites, trained),
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
            sent,
            traffic_of(config),
            choice,
            memory,
            task,
            run,
            lambda config: compose(config, choice, memory),
        )

    one_by_one = compose(config, Choice(ClientAxis(), ""), {})
    a_client = client_bytes(
        local_apply,
        task,
        local_optimizer(config.client),
        params,
        batch,
        trained=trained,
        proximal=config.client.proximal,
    )
    frozen = _own_frozen_bytes(params, sites, trained, one_by_one.traffic)
    # Twice, as was measured: the compiler does not overwrite them in place. And a merged matrix
    # with its gradient.
    a_client += 2 * frozen
    a_client += sum(8 * math.prod(one.matrix.shape) for one in merged.adapters) if merged else 0
    fixed = {
        "dequantized proxy of the round": 4 * _entries(keep(params, sent)),
        "sum of deltas": 4 * _entries(keep(params, trained)),
        **_fixed_memory(one_by_one.federation, plain, sites, config, data),
    }
    steps = update_of(config).step_count(data.rows(_some_clients(population)))
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
        of_one = tree_bytes(keep(params, trained)) + frozen
        memory["clients that come and go"] = refills * of_one
    return compose(config, choice, memory)


def _with_adapters(federation: Federation, lora: Lora) -> Federation:
    """The same, starting from the plain model's parameters."""

    def init(key: Key, params: Params) -> ServerState:
        adapter_key = fold_in_name(fold_in_name(key, "secret"), "adapters")
        return federation.init(key, lora.add(adapter_key, params))

    return federation._replace(init=init)


def _entries(params: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _own_frozen_bytes(params: Params, sites: Sites, trained: Selection, traffic: Traffic) -> int:
    """Bytes of the frozen tensors that each client has in its own way, because they are masked."""
    masked = [site for site in sites if site.mask_path in traffic.down.per_column]
    paths = frozenset(path for site in masked for path in (site.path, site.bias_path) if path)
    return tree_bytes(keep(drop(params, trained), paths))


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
    columns = sum(site.layers * site.columns for site in sites if site.draws)
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

    key = federation_key(config)
    state = dataclasses.replace(
        jax.eval_shape(federation.init, key, params), public_key=jax.jit(public_key)(key)
    )
    cohorts = draw_cohorts(federation, state, config.rounds)
    calls = [cohorts[start:stop] for start, stop in calls_of(0, config)]
    needed, available = 2 * capacity_for(data, calls).device_bytes(data), device_bytes()
    if needed > available:
        raise ConfigError(
            f"rounds_per_call = {config.rounds_per_call}: the clients' rows of two calls take "
            f"{needed / 2**30:.1f} GiB, a device has {available / 2**30:.1f} GiB; allowed is less, "
            f"or a smaller cohort.size"
        )
    return {"clients' rows of two calls": needed}


def calls_of(finished: int, config: Config) -> list[tuple[int, int]]:
    """The calls that are left: numbers of rounds that are finished before and after each."""
    per_call = config.rounds_per_call
    boundaries = range((finished // per_call + 1) * per_call, config.rounds, per_call)
    ends = [*boundaries, config.rounds]
    return list(zip([finished, *ends], ends, strict=False)) if finished < config.rounds else []


def algorithm_of(config: Config) -> Algorithm:
    """Returns the algorithm that a configuration names, with the settings that it uses."""
    return make_algorithm(
        config.algorithm,
        make_quantizer(config),
        config.p1,
        config.p2,
        config.sampling,  # type: ignore[arg-type]
    )


def make_quantizer(config: Config) -> Quantizer:
    """Returns the quantizer that a configuration names."""
    kind = _CODEBOOKS[config.codebook]
    return kind(config.bits, config.block_size, blocks_along=config.blocks)


def _upload_quantizer(config: Config) -> Quantizer | None:
    settings = config.upload
    if not settings.bits:
        return None
    return _CODEBOOKS[settings.codebook](settings.bits, settings.block_size)


def _upload(config: Config, sites: Sites, trained: Selection) -> Upload | None:
    quantizer = _upload_quantizer(config)
    if quantizer is None:
        return None
    if not any(site.quantized and (trained is None or site.path in trained) for site in sites):
        raise ConfigError(
            f"upload.bits = {config.upload.bits}: no kernel of a site is trained, or they are "
            f"adapters that are not quantized; allowed is 0, or lora.quantize = True"
        )
    feedback = config.upload.error_feedback
    return quantized_upload(quantizer, sites, feedback=feedback, trained=trained)


_CODEBOOKS: dict[str, type[Quantizer]] = {
    "normal_float": NormalFloat,
    "symmetric_normal_float": SymmetricNormalFloat,
    "uniform": Uniform,
}


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


def root_key(config: Config) -> Array:
    """Returns the key from which everything in a run is drawn."""
    return jax.random.key(np.uint32(config.seed))


def place(simulation: Simulation, tree: Tree) -> Tree:
    """Puts a state or data where the simulation's calls want them; see `placement.replicate`."""
    return replicate(tree, simulation.choice.axis.mesh)


def initial_state(simulation: Simulation, params: Params) -> ServerState:
    """Returns the state before the first round, in its place; the parameters are copied."""
    init = jax.jit(simulation.federation.init)
    return place(simulation, init(federation_key(simulation.config), params))


def federation_key(config: Config) -> Array:
    """Returns the key that `rounds.Federation.init` gets."""
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
    calls = calls_of(int(state.round), config)
    test, last = place(simulation, (test, jnp.int32(config.rounds)))
    feed = _feed(simulation, state, data, calls)
    began = time.perf_counter()
    rows = next(feed, None)
    for finished, stop in calls:
        until = place(simulation, jnp.int32(stop))
        state, result = simulation.run(state, rows, test, until, last)
        # The call runs on while the host prepares the next one's rows.
        rows = next(feed, None)
        result = jax.device_get(result)
        took = time.perf_counter() - began
        entries = []
        for index in np.flatnonzero(result.evaluated[: stop - finished]):
            share = (index + 1) / (stop - finished)
            entry = {"round": finished + int(index) + 1, **entry_of(simulation, result, int(index))}
            entries.append({**entry, "seconds": round(float(seconds + share * took), 6)})
        seconds += took
        yield stop, state, entries
        began = time.perf_counter()


def entry_of(simulation: Simulation, result: CallResult, index: int) -> Entry:
    """Returns what one evaluated round of a call tells.

    That is metrics, the training loss, how many clients returned an update and whose were rejected,
    and bytes, means over the sampled clients.

    Args:
      simulation: The method, whose payloads are counted.
      result: What the call brought to the host.
      index: The round's place in it.
    """
    cohort, traffic = simulation.config.cohort.size, simulation.traffic
    facts = {name: values[index] for name, values in result.facts.items()}

    def columns(kind: str) -> dict[str, float]:
        of_kind = (name for name in facts if name.startswith(f"{kind}/"))
        return {name.partition("/")[2]: int(facts[name]) / cohort for name in of_kind}

    counts = {name: int(facts[f"clients/{name}"]) for name in ("returned", "rejected")}
    return {
        **_ordered({name: values[index] for name, values in result.metrics.items()}),
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
    every_call = [cohorts[start:stop] for start, stop in calls_of(0, simulation.config)]
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


def server_optimizer(settings: ServerConfig, rounds: int) -> optax.GradientTransformation:
    """Returns the optimizer of the server; ``rounds`` is how many there are in all."""
    rate: Any = settings.learning_rate
    if settings.decay == "linear":
        rate = optax.linear_schedule(settings.learning_rate, 0.0, max(rounds, 1))
    makers = {
        "sgd": lambda: optax.sgd(rate, settings.momentum or None),
        "adagrad": lambda: optax.adagrad(rate),
        "adam": lambda: optax.adam(rate),
        "yogi": lambda: optax.yogi(rate),
        "lamb": lambda: optax.lamb(rate),
        "adafactor": lambda: optax.adafactor(rate),
    }
    return makers[settings.optimizer]()
