"""A whole deployment on this machine: a SuperLink, SuperNodes and a run, over loopback only.

Everything that it starts it ends: each program is the leader of a process group of its own, whose
number is kept.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedqsn_jax.config.choices import IMAGE_SETS
from fedqsn_jax.config.schema import Config, ConfigError, to_dict, with_fields
from fedqsn_jax.data import registry
from fedqsn_jax.data.streamed import HostData
from fedqsn_jax.deploy.bundle import write_bundle
from fedqsn_jax.reporting.display import Display

_LOOPBACK = "127.0.0.1"
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
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
        environment = {
            **os.environ,
            **_QUIET,
            "FLWR_HOME": str(place / "flower"),
            "FEDQSN_SERVER": str(settings),
            # Flower starts programs of its own by their names.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        port = _free_port()
        link = [
            _program("flower-superlink"),
            "--insecure",
            f"--host={_LOOPBACK}",
            f"--port={port}",
            "--disable-runtime-dependency-installation",
        ]
        log = place / "superlink.log"
        server = running.enter_context(_process(link, environment, log))
        _wait_for_port(port, server, log)
        for number, file in enumerate(client_files):
            node = [
                _program("flower-supernode"),
                "--insecure",
                f"--superlink={_LOOPBACK}:{port}",
                f"--host={_LOOPBACK}",
                f"--port={_free_port()}",
                f'--node-config=fedqsn-client="{file}"',
            ]
            running.enter_context(_process(node, environment, place / f"client_{number}.log"))
        display.message("the SuperLink and the SuperNodes have been started")
        _run_app(place, port, environment, settings, server)


def require_flower() -> None:
    """Makes sure that Flower is installed.

    Raises:
      ConfigError: It is not.
    """
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Flower is not installed: pip install 'fedqsn_jax[deploy]', or in a checkout "
            "pip install '.[deploy]'"
        ) from error


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
    home = place / "flower"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "demo"\n\n[superlink.demo]\naddress = "{_LOOPBACK}:{port}"\n'
        f"insecure = true\n"
    )
    bundle = write_bundle(place)
    # With the stream it ends with the run.
    command = [_program("flwr"), "run", str(bundle), "demo", "--stream"]
    shown = settings.with_name("server.log")
    shown.touch()
    with _process(command, environment, place / "flwr.log") as started, shown.open() as lines:
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


def _program(name: str) -> str:
    """The path of a program of this environment."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name}: no such program; pip install 'fedqsn_jax[deploy]'")
    return found


@contextlib.contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program as the leader of a group, which is ended at the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: "subprocess.Popen[Any]") -> None:
    """Ends a program and all that it has started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, server: "subprocess.Popen[Any]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ConfigError(f"the SuperLink ended at once; {log} says why")
        with contextlib.suppress(OSError), socket.create_connection((_LOOPBACK, port), 1):
            return
        time.sleep(0.2)
    raise ConfigError(f"the SuperLink did not answer within a minute; {log} says more")
