"""A server's run: rounds over a network of clients, checkpoints, evaluation, and what is told."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import Config, ConfigError, chooses_scale
from fedqsn_jax.core.trees import leaves_by_path, select
from fedqsn_jax.core.types import Batch
from fedqsn_jax.data.population import HeldOut, from_clients
from fedqsn_jax.deploy.asking import Asking
from fedqsn_jax.deploy.network import Network
from fedqsn_jax.deploy.plan import Plan, make_plan
from fedqsn_jax.deploy.registry import REGISTRY, Registry, choose_cohort
from fedqsn_jax.deploy.server import open_round, system_key
from fedqsn_jax.deploy.server_model import server_model
from fedqsn_jax.host.checkpoints import Checkpoints
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
from fedqsn_jax.simulation.running import mean_download


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
      notes: What the user should know, a line each.
    """

    config: Config
    simulation: Simulation
    layout: Layout
    plan: Plan
    start: Callable[[], Any]
    test: Batch
    notes: tuple[str, ...] = ()


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
    """Makes a server.

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
    model = server_model(config, classes, test)
    params, task = model.params, model.task
    # Of clients' rows a method needs their shapes only; how many they are, the clients will say.
    one = {name: np.zeros_like(np.asarray(rows)[:1]) for name, rows in test.items()}
    population = from_clients([one] * clients)
    simulation = make_simulation(
        config, model.apply_fn, task, params, population, model.client_apply
    )
    layout = _layout(simulation, params)
    rows = {
        name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in test.items()
    }
    return Server(
        config=config,
        simulation=simulation,
        layout=layout,
        plan=make_plan(config, layout, classes, rows, model.language),
        start=lambda: pretrain(config, model.pretraining_apply, task, params, private),
        notes=model.notes,
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


def public_base(server: Server) -> dict[str, np.ndarray]:
    """Returns the tensors, by their paths, that clients need and that never travel.

    Where a model is public and only a part of it is trained, clients have the rest themselves:
    the model as the server has trained it on its own rows. It is empty where all travels.
    """
    sent = {tensor.path for tensor in server.layout.tensors}
    roles = server.simulation.roles
    if roles.sent is None or roles.withheld:
        return {}
    started = leaves_by_path(server.start())
    return {path: np.asarray(leaf) for path, leaf in started.items() if path not in sent}


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
        registry = Registry(
            directory / REGISTRY, server.simulation.population, begun=int(state.round) > 0
        )
        began, before = time.perf_counter(), history[-1]["seconds"]
        score = f"global/{server.simulation.task.score}"
        evaluate = jax.jit(server.simulation.federation.evaluate)
        with display.progress(config.rounds, int(state.round), "accuracy") as progress:
            while int(state.round) < config.rounds:
                clients = _wait_for(
                    network, registry, config.cohort.size, patience.clients, display
                )
                cohort = choose_cohort(state, clients, config.cohort.size)
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
    for note in server.notes:
        display.message(note)
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


def _wait_for(
    network: Network, registry: Registry, wanted: int, seconds: float, display: Display
) -> dict[int, str]:
    """The clients that are there, once they are enough, by their numbers."""
    deadline, told, left_out = time.monotonic() + seconds, 0.0, set[str]()
    while True:
        clients, beyond = registry.numbers(network.nodes())
        for node in sorted(set(beyond) - left_out):
            display.warning(
                f"{node} is left out: as many clients as may ever take part "
                f"(--clients) have come before it"
            )
        left_out |= set(beyond)
        if len(clients) >= wanted:
            return clients
        if time.monotonic() > deadline:
            raise ConfigError(
                f"cohort.size = {wanted}: {len(clients)} clients are there after {seconds:.0f} "
                f"seconds; start more of them, or set a smaller cohort"
            )
        if time.monotonic() - told > 5:
            display.message(f"waiting for clients: {len(clients)} of {wanted} are there")
            told = time.monotonic()
        time.sleep(0.2)


def _round(
    server: Server,
    network: Network,
    state: ServerState,
    cohort: Mapping[int, str],
    patience: Patience,
    display: Display,
) -> tuple[ServerState, dict[str, float]]:
    """One round; returns the state after it and what it tells."""
    current = open_round(server.simulation.method, server.layout, state)
    asking = Asking(current, cohort, server.plan.encode(), display)
    asking.run(network, patience.answers)
    state, told = current.close()
    down = asking.down / len(cohort)
    if "payloads" in told:
        # As a simulation has it: over all rounds so far, since who has its payload gets none.
        drawn = server.config.cohort.size * (current.number + 1)
        down = mean_download(server.simulation.traffic, told, drawn)
    facts = {name: float(told[name]) for name in _FACTS if name in told}
    facts["bytes/down_per_client"] = down
    facts["bytes/up_per_client"] = asking.up / len(cohort)
    return state, facts


_FACTS = ("train/loss", "clients/sent", "clients/returned", "clients/rejected")


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
