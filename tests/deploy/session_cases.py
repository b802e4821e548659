"""A deployed run in memory, and the simulated run that it is to equal."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from deploy_cases import CLASSES, CLIENT_ROWS, CLIENTS, PRIVATE, TEST, MemoryNetwork

from fedqsn_jax.config.schema import Config
from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.data.population import from_clients
from fedqsn_jax.deploy.session import Patience, Server, make_server, run_server
from fedqsn_jax.reporting.display import silent_display
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.simulation.running import initial_state, run_rounds


@functools.cache
def server_of(config: Config) -> Server:
    """A server of a configuration; the same for the same one, so that it is compiled once."""
    private, test = (
        {name: jnp.asarray(array) for name, array in each.items()} for each in (PRIVATE, TEST)
    )
    server = make_server(config, private, test, clients=CLIENTS, classes=CLASSES)
    return dataclasses.replace(server, start=functools.cache(server.start))


def deployed(
    config: Config,
    directory: Path,
    network: MemoryNetwork | None = None,
    key: jax.Array | None = None,
) -> tuple[ServerState, MemoryNetwork]:
    """Runs a deployment with the keys of a simulation."""
    network = network or MemoryNetwork()
    key = federation_key(config.seed) if key is None else key
    state = run_server(server_of(config), network, directory, silent_display(), Patience(1, 1), key)
    return state, network


def simulated(config: Config) -> tuple[ServerState, list[dict[str, Any]]]:
    """Returns the simulation's last state and what it tells of each round."""
    server = server_of(config)
    state = initial_state(server.simulation, server.start())
    test = {name: jnp.asarray(array) for name, array in TEST.items()}
    entries: list[dict[str, Any]] = []
    data = from_clients(CLIENT_ROWS)
    for _, latest, more in run_rounds(server.simulation, state, data, test):
        state, entries = latest, entries + more
    return state, entries


def history(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
