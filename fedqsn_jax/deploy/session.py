"""A server's run: rounds over a network of clients, checkpoints, evaluation, and what is told.

The network is a `Network`: who is there, and messages to and fro. Flower's is in `server_app`;
tests have one in memory.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import Config, ConfigError, chooses_scale
from fedqsn_jax.core.keys import fold_in_name, keyed_permutation, root_key
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.trees import select
from fedqsn_jax.core.types import Batch
from fedqsn_jax.data.population import HeldOut, from_clients
from fedqsn_jax.deploy.plan import Plan, make_plan
from fedqsn_jax.deploy.server import Round, open_round, system_key
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.models.functional import linen_apply, linen_init
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.problems.training import pretrain
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import whole_proxy
from fedqsn_jax.reporting.display import Display
from fedqsn_jax.reporting.summary import summarize
from fedqsn_jax.reporting.writers import MetricsFile, write_json
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.runs.working_directory import WorkDirectory
from fedqsn_jax.simulation.compose import Simulation, make_simulation
from fedqsn_jax.simulation.costs import expected_costs
from fedqsn_jax.simulation.from_config import upload_quantizer

REGISTRY = "clients.json"
"""In the working directory: which client has which number, in the order in which they came."""


class Reply(NamedTuple):
    """What came back from a node.

    Attributes:
      node: Its name in the network.
      payload: An update's bytes.
      settings: What came with it: ``token``, ``examples``, ``loss``.
      failure: Why there is no payload, or empty.
    """

    node: str
    payload: bytes = b""
    settings: Mapping[str, Any] = {}
    failure: str = ""


class Network(Protocol):
    """The nodes that a server can reach."""

    def nodes(self) -> list[str]:
        """Names of the nodes that are there now: of registered keys, where nodes have any."""

    def exchange(
        self, messages: Iterable[tuple[str, bytes, dict[str, Any]]], timeout: float
    ) -> Iterator[Reply]:
        """Sends messages, each when it is asked for, and gives replies as they come.

        It ends when all have answered, or ``timeout`` seconds after the last was sent.
        """


@dataclasses.dataclass(frozen=True)
class Server:
    """What a server is made of.

    Attributes:
      config: The settings.
      simulation: The method.
      layout: The structure of payloads.
      plan: What clients are told.
      start: ``() -> parameters``: the model before the first round, trained on the server's rows.
      test: Rows to evaluate on.
    """

    config: Config
    simulation: Simulation
    layout: Layout
    plan: Plan
    start: Callable[[], Any]
    test: Batch


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a server waits, in seconds.

    Attributes:
      clients: For as many clients as a cohort has, before a round.
      answers: For the answers of a round.
    """

    clients: float = 600.0
    answers: float = 600.0


def make_server(
    config: Config, private: Batch, test: Batch, *, clients: int, classes: int
) -> Server:
    """Makes a server of an image model.

    Args:
      config: The settings; of ``data`` nothing but the seed of the division plays a part.
      private: The server's own rows to train on first, named arrays ``[rows, ...]``.
      test: Rows to evaluate on.
      clients: The most clients that may ever take part.
      classes: Number of labels.

    Raises:
      ConfigError: The settings do not fit, or need what a deployment has not.
    """
    _check(config)
    example = {name: rows[:1] for name, rows in test.items()}
    module = make_model(config.model, classes, config.client.dropout)
    params = linen_init(module, fold_in_name(root_key(config.seed), "model"), example)
    apply_fn = linen_apply(module)
    pretraining_apply = linen_apply(make_model(config.model, classes, config.pretraining.dropout))
    task = classification()
    # Of clients' rows a method needs their shapes only; how many they are, the clients will say.
    one = {name: np.zeros_like(np.asarray(rows)[:1]) for name, rows in test.items()}
    simulation = make_simulation(config, apply_fn, task, params, from_clients([one] * clients))
    layout = _layout(simulation, params)
    rows = {
        name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in test.items()
    }
    return Server(
        config=config,
        simulation=simulation,
        layout=layout,
        plan=make_plan(config, layout, classes, rows),
        start=lambda: pretrain(config, pretraining_apply, task, params, private),
        test=test,
    )


def _check(config: Config) -> None:
    if config.algorithm == "fedsp":
        raise ConfigError("algorithm = 'fedsp': not deployed; allowed are the other algorithms")
    if chooses_scale(config):
        raise ConfigError(
            "server.scale = 0: a deployment does not choose it; allowed is server.scale above 0"
        )
    if config.upload.error_feedback:
        raise ConfigError(
            "upload.error_feedback = True: clients keep nothing between rounds in a deployment; "
            "allowed is False"
        )
    if config.privacy.clip:
        raise ConfigError(
            f"privacy.clip = {config.privacy.clip}: a deployment takes the clients that are there, "
            f"who are no random cohort; allowed is 0"
        )
    if config.evaluation.fine_tuned_attackers:
        raise ConfigError(
            f"evaluation.fine_tuned_attackers = {config.evaluation.fine_tuned_attackers}: a "
            f"deployment's server has no rows of clients; allowed is 0"
        )
    if config.cohort.sampling != "without_replacement":
        raise ConfigError(
            f"cohort.sampling = {config.cohort.sampling!r}: a deployment asks as many clients in "
            f"each round; allowed is 'without_replacement'"
        )


def _layout(simulation: Simulation, params: Any) -> Layout:
    """The structure of payloads, from shapes alone."""
    method = simulation.method

    def proxy(key: jax.Array) -> Any:
        state = simulation.federation.init(key, params)
        prepared = method.transform.prepare(
            state.transform_state,
            whole_proxy(select(state.params, method.roles.sent), method.sites),
        )
        return method.transform.apply(key, state.transform_state, prepared)

    shapes = jax.eval_shape(proxy, jax.random.key(0))
    return Layout.of(
        shapes, trained=method.roles.returned, upload=upload_quantizer(simulation.config)
    )


def initial_state(server: Server, key: jax.Array | None = None) -> ServerState:
    """Returns the state before the first round.

    Args:
      server: The server.
      key: From which everything is drawn, for tests; None: secrets and what clients get of keys
        are drawn apart, from the operating system's entropy.
    """
    init = jax.jit(server.simulation.federation.init)
    params = server.start()
    if key is not None:
        return init(key, params)
    return dataclasses.replace(init(system_key(), params), public_key=system_key())


def run_server(
    server: Server,
    network: Network,
    directory: Path,
    display: Display,
    patience: Patience,
    key: jax.Array | None = None,
) -> ServerState:
    """Runs, or goes on with, a server's rounds.

    Args:
      server: The server.
      network: Its clients.
      directory: The working directory, which holds the hidden model and the keys.
      display: Where progress is shown.
      patience: How long it waits.
      key: See `initial_state`.

    Raises:
      ConfigError: The directory belongs to another run.
      CheckpointError: Its checkpoints cannot be read.
    """
    config, work = server.config, WorkDirectory(directory)
    with (
        work.claim(config),
        Checkpoints(
            work.checkpoints, config.checkpoint.keep_latest, config.checkpoint.keep_best
        ) as checkpoints,
    ):
        state, history = _begin(server, work, checkpoints, display, key)
        metrics = MetricsFile(work.metrics)
        metrics.rewrite(history)
        registry = _Registry(directory / REGISTRY, server.plan)
        began, before = time.perf_counter(), history[-1]["seconds"]
        score = f"global/{server.simulation.task.score}"
        evaluate = jax.jit(server.simulation.federation.evaluate)
        with display.progress(config.rounds, int(state.round), "accuracy") as progress:
            while int(state.round) < config.rounds:
                nodes = _wait_for(network, config.cohort.size, patience.clients, display)
                cohort = _cohort(state, registry, nodes, config.cohort.size)
                state, facts = _round(server, network, state, cohort, patience, display)
                number = int(state.round)
                if number % config.evaluation.every == 0 or number == config.rounds:
                    values = jax.device_get(evaluate(state, HeldOut(server.test, {})))
                    seconds = round(before + time.perf_counter() - began, 6)
                    entry = {"round": number, **_floats(values), **facts, "seconds": seconds}
                    history.append(entry)
                    metrics.append([entry])
                    progress.update(number, [entry])
                # After every round: what clients have answered is not asked for again.
                checkpoints.save(number, state, history, history[-1].get(score, float("nan")))
        checkpoints.wait()
        costs = expected_costs(server.simulation)
        summary = summarize(history, costs, history[-1]["seconds"], server.simulation.task.score)
        write_json(work.summary, summary)
        display.final_table(summary)
    return state


def _begin(
    server: Server,
    work: WorkDirectory,
    checkpoints: Checkpoints,
    display: Display,
    key: jax.Array | None,
) -> tuple[ServerState, list[dict[str, Any]]]:
    """The state and history to go on from; those before the first round where there is nothing."""
    federation = server.simulation.federation
    if checkpoints.latest_round() is not None:
        like = jax.eval_shape(lambda: federation.init(jax.random.key(0), _shapes_of_start(server)))
        state, history = checkpoints.restore(like)
        display.message(f"resumed after round {int(state.round)}")
        return state, history
    display.message(f"{work.path}: only you may read it; it holds the hidden model and the keys")
    state = initial_state(server, key)
    values = jax.device_get(jax.jit(federation.evaluate)(state, HeldOut(server.test, {})))
    history = [{"round": 0, **_floats(values), "seconds": 0.0}]
    work.write_config(server.config)
    score = f"global/{server.simulation.task.score}"
    checkpoints.save(0, state, history, history[0][score])
    return state, history


def _shapes_of_start(server: Server) -> Any:
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(server.start)
    )


def _wait_for(network: Network, wanted: int, seconds: float, display: Display) -> list[str]:
    """The nodes that are there, once they are enough."""
    deadline, told = time.monotonic() + seconds, 0.0
    while len(nodes := network.nodes()) < wanted:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"cohort.size = {wanted}: {len(nodes)} clients are there after {seconds:.0f} "
                f"seconds; start more of them, or set a smaller cohort"
            )
        if time.monotonic() - told > 5:
            display.message(f"waiting for clients: {len(nodes)} of {wanted} are there")
            told = time.monotonic()
        time.sleep(0.2)
    return nodes


class _Registry:
    """Numbers of clients, kept in a file: a client that comes back has the number that it had."""

    def __init__(self, file: Path, plan: Plan) -> None:
        self._file = file
        self._numbers: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}

    def numbers(self, nodes: Iterable[str]) -> dict[int, str]:
        """Returns nodes by their numbers; who is new gets the next one."""
        new = [node for node in sorted(nodes) if node not in self._numbers]
        if new:
            for node in new:
                self._numbers[node] = len(self._numbers)
            with replacing(self._file) as temporary:
                temporary.write_text(json.dumps(self._numbers, indent=2) + "\n")
        return {self._numbers[node]: node for node in nodes}


def _cohort(state: ServerState, registry: _Registry, nodes: list[str], size: int) -> dict[int, str]:
    """Who takes part: the first that are there, in the order in which a round asks for them."""
    numbers = registry.numbers(nodes)
    population = max(numbers) + 1
    key = fold_in_name(jax.random.fold_in(state.public_key, state.round), "cohort")
    order = keyed_permutation(key, jnp.arange(population, dtype=jnp.int32), population)
    present = [int(number) for number in np.asarray(order) if int(number) in numbers]
    return {number: numbers[number] for number in present[:size]}


def _round(
    server: Server,
    network: Network,
    state: ServerState,
    cohort: Mapping[int, str],
    patience: Patience,
    display: Display,
) -> tuple[ServerState, dict[str, float]]:
    """One round: payloads out, updates in, each as it comes."""
    current = open_round(server.simulation.method, server.layout, state)
    numbers = {node: number for number, node in cohort.items()}
    traffic = {"down": 0, "up": 0}
    plan = server.plan.encode()

    def messages() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        for number, node in cohort.items():
            payload, token = current.payload(number)
            traffic["down"] += len(payload)
            key = current.training_key(number)
            yield node, payload, {"plan": plan, "token": token, "key": key}

    for reply in network.exchange(messages(), patience.answers):
        traffic["up"] += len(reply.payload)
        _take(current, numbers, reply, display)
    state, facts = current.close()
    facts["bytes/down_per_client"] = traffic["down"] / len(cohort)
    facts["bytes/up_per_client"] = traffic["up"] / len(cohort)
    for number in sorted(set(cohort) - set(current.answered) - set(current.rejected)):
        display.warning(f"round {current.number + 1}: client {number} did not answer in time")
    return state, facts


def _take(current: Round, numbers: Mapping[str, int], reply: Reply, display: Display) -> None:
    number = numbers.get(reply.node)
    if number is None:
        display.warning(f"round {current.number + 1}: an answer of someone who was not asked")
        return
    if reply.failure:
        current.rejected[number] = reply.failure
        reason: str | None = reply.failure
    else:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            token, examples = bytes(reply.settings["token"]), int(reply.settings["examples"])
            loss = float(reply.settings["loss"])
            reason = current.accept(number, token, reply.payload, examples, loss)
            if reason is None:
                return
            display.warning(f"round {current.number + 1}: client {number} is not counted: {reason}")
            return
        reason = current.rejected[number] = "an answer without token, examples or loss"
    display.warning(f"round {current.number + 1}: client {number} is not counted: {reason}")


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
