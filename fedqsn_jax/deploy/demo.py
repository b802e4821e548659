"""A whole deployment on this machine: a SuperLink, SuperNodes and a run, over loopback only.

Everything that it starts it ends: each program is the leader of a process group of its own, whose
number is kept.
"""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedqsn_jax.config.choices import IMAGE_SETS
from fedqsn_jax.config.schema import Config, ConfigError, to_dict, with_fields
from fedqsn_jax.data import registry
from fedqsn_jax.data.streamed import HostData
from fedqsn_jax.deploy.bundle import write_bundle
from fedqsn_jax.deploy.processes import (
    flower_environment,
    free_port,
    name_superlink,
    process,
    program,
    require_flower,
    superlink,
    supernode,
    wait_for_port,
)
from fedqsn_jax.reporting.display import Display

_PATIENCE = 300.0


def demo(config: Config, clients: int, directory: Path, display: Display) -> None:
    """Runs a configuration between a server and clients that are processes of this machine.

    Args:
      config: What to run; images only.
      clients: Number of clients; all take part in each round, if ``cohort.size`` is larger.
      directory: The server's working directory.
      display: Where progress is shown.

    Raises:
      ConfigError: The configuration is not possible, Flower is not installed, or the run failed.
    """
    require_flower()
    if config.data.name not in IMAGE_SETS:
        raise ConfigError(
            f"data.name = {config.data.name!r}: the demo takes images: {', '.join(IMAGE_SETS)}"
        )
    if clients < 1:
        raise ConfigError(f"--clients={clients}: allowed is 1 or more")
    size = min(config.cohort.size, clients)
    attackers = tuple(count for count in config.evaluation.attackers if count <= clients)
    config = with_fields(
        config,
        {"data.clients": clients, "cohort.size": size, "evaluation.attackers": attackers},
    )
    place = Path(f"{directory}.demo").absolute()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    settings, client_files = _lay_out(config, clients, directory, place)
    display.message(f"{clients} clients' rows and settings are in {place}, one directory each")
    with contextlib.ExitStack() as running:
        environment = flower_environment(place / "flower", settings)
        port = free_port()
        log = place / "superlink.log"
        server = running.enter_context(process(superlink(port), environment, log))
        wait_for_port(port, server, log)
        for number, file in enumerate(client_files):
            running.enter_context(
                process(
                    supernode(port, file),
                    flower_environment(file.parent / "flower"),
                    place / f"client_{number}.log",
                )
            )
        display.message("the SuperLink and the SuperNodes have been started")
        _run_app(place, port, environment, settings, server)


def _lay_out(
    config: Config, clients: int, directory: Path, place: Path
) -> tuple[Path, Sequence[Path]]:
    """Deals the rows: a directory for the server's and one for each client's."""
    splits = registry.load(with_fields(config.data, {"resident": "host"}), config.seed)
    server = place / "server"
    server.mkdir(mode=0o700)
    _write_rows(server / "private.npz", splits.private)
    _write_rows(server / "test.npz", splits.test)
    population = splits.clients
    if not isinstance(population, HostData):
        raise TypeError(f"rows on the host are expected, not {type(population).__name__}")
    offsets = np.asarray(population.offsets)
    files = []
    for number in range(clients):
        own = place / f"client_{number}"
        own.mkdir(mode=0o700)
        start, stop = int(offsets[number]), int(offsets[number + 1])
        examples = {name: rows[start:stop] for name, rows in population.examples.items()}
        _write_rows(own / "rows.npz", examples)
        file = own / "client.toml"
        file.write_text(f'rows = "npz:{own / "rows.npz"}"\ncache = "{place / "programs"}"\n')
        files.append(file)
    settings = server / "server.json"
    values = {
        "config": to_dict(config),
        "workdir": str(directory.absolute()),
        "private": f"npz:{server / 'private.npz'}",
        "test": f"npz:{server / 'test.npz'}",
        "clients": clients,
        "classes": int(splits.num_classes),
        "wait_clients": _PATIENCE,
        "wait_answers": _PATIENCE,
        "cache": str(server / "programs"),
        "log": str(server / "server.log"),
    }
    settings.write_text(json.dumps(values, indent=2) + "\n")
    return settings, files


def _write_rows(file: Path, rows: Mapping[str, Any]) -> None:
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in rows.items()}
    np.savez(file, **arrays)


def _run_app(
    place: Path,
    port: int,
    environment: Mapping[str, str],
    settings: Path,
    server: subprocess.Popen[bytes],
) -> None:
    """Starts the run and shows what the server's program tells, until it ends."""
    outcome = settings.with_name("outcome.json")
    name_superlink(place / "flower", port)
    bundle = write_bundle(place)
    # With the stream it ends with the run.
    command = [program("flwr"), "run", str(bundle), "fedqsn", "--stream"]
    shown = settings.with_name("server.log")
    shown.touch()
    with process(command, environment, place / "flwr.log") as started, shown.open() as lines:
        while True:
            ended = outcome.exists() or server.poll() is not None or started.poll() is not None
            for line in lines:
                print(line, end="", flush=True)
            if ended:
                break
            time.sleep(0.2)
    if not outcome.exists():
        raise ConfigError(f"the run did not end well; {place / 'superlink.log'} says more")
    refused = json.loads(outcome.read_text()).get("refused")
    if refused:
        raise ConfigError(refused)
