"""Flower's programs on this machine: found, started as groups of their own, and ended."""

import contextlib
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

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.host import signals

LOOPBACK = "127.0.0.1"
SETTINGS_VARIABLE = "FEDQSN_SERVER"
"""The environment variable that names the server's settings file. Not Flower's run configuration,
which is sent to every client."""
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


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


def flower_environment(home: Path, settings: Path | None = None) -> dict[str, str]:
    """Returns the environment of Flower's programs.

    Args:
      home: The directory where Flower keeps what is its own.
      settings: The server's settings file; None: of a client.
    """
    return {
        **{name: value for name, value in os.environ.items() if name != SETTINGS_VARIABLE},
        **_QUIET,
        **({} if settings is None else {SETTINGS_VARIABLE: str(settings)}),
        "FLWR_HOME": str(home),
        # Flower starts programs of its own by their names.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def superlink(port: int, *options: str) -> list[str]:
    """Returns the command of a SuperLink on loopback; without options it uses no TLS."""
    return [
        program("flower-superlink"),
        *(options or ("--insecure",)),
        f"--host={LOOPBACK}",
        f"--port={port}",
        "--disable-runtime-dependency-installation",
    ]


def supernode(port: int, client: Path, *options: str) -> list[str]:
    """Returns the command of a SuperNode on loopback; without options it uses no TLS.

    Args:
      port: The SuperLink's.
      client: The client's settings file.
      options: Certificates and keys.
    """
    return [
        program("flower-supernode"),
        *(options or ("--insecure",)),
        f"--superlink={LOOPBACK}:{port}",
        f"--host={LOOPBACK}",
        f"--port={free_port()}",
        f'--node-config=fedqsn-client="{client}"',
    ]


def name_superlink(home: Path, port: int, certificate: Path | None = None) -> None:
    """Tells ``flwr`` where the SuperLink is, in its own file of settings, under ``fedqsn``.

    Args:
      home: The directory that ``FLWR_HOME`` names.
      port: The SuperLink's.
      certificate: Of the authority that has signed the SuperLink's; None: no TLS.
    """
    home.mkdir(exist_ok=True)
    trust = "insecure = true" if certificate is None else f'root-certificates = "{certificate}"'
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "fedqsn"\n\n[superlink.fedqsn]\n'
        f'address = "{LOOPBACK}:{port}"\n{trust}\n'
    )


def program(name: str) -> str:
    """Returns the path of a program of this environment.

    Raises:
      ConfigError: There is none.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name}: no such program; pip install 'fedqsn_jax[deploy]'")
    return found


@contextlib.contextmanager
def process(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program as the leader of a group, which is ended at the end of the block.

    Args:
      command: The program and its arguments.
      environment: All of its environment.
      log: The file to which it writes on.
    """
    with log.open("ab") as output:
        started = subprocess.Popen(
            command,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    # A signal that ends this process leaves no time to wait for others.
    with signals.cleaning_up(lambda: kill(started)):
        try:
            yield started
        finally:
            end(started)


def kill(process: "subprocess.Popen[Any]") -> None:
    """Kills a program and all that it has started, and waits for nothing."""
    if process.poll() is not None:
        return
    for number in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def end(process: "subprocess.Popen[Any]") -> None:
    """Ends a program and all that it has started, also in sessions of their own."""
    # They cannot be found any more once the program is gone.
    below = descendants(process.pid)
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for number in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, kind)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def descendants(parent: int) -> list[int]:
    """Returns the numbers of the processes that a process has started, and those they have.

    Where there is no ``/proc``, none; Flower's programs end with their parents all the same.
    """
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name stands in brackets, and may hold anything.
            fields = file.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(file.parent.name))
    found, todo = [], [parent]
    while todo:
        more = children.get(todo.pop(), [])
        found += more
        todo += more
    return found


def free_port() -> int:
    """Returns a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, server: "subprocess.Popen[Any]", log: Path) -> None:
    """Waits, a minute at most, until a server answers.

    Raises:
      ConfigError: It has ended, or does not answer.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ConfigError(f"the SuperLink ended at once; {log} says why")
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 1):
            return
        time.sleep(0.2)
    raise ConfigError(f"the SuperLink did not answer within a minute; {log} says more")
