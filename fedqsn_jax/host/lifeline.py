"""How the processes of a run find each other, and notice that one is gone.

Process 0 listens; every other one connects, says who it is and what it is about to run, and is let
in or refused. The connections stay open: both ends send a beat every few seconds. A connection that
closes without a farewell, or falls silent, means that the process at the other end is gone; then
this one says so in a line and ends, whatever it is waiting for. (A collective operation with a
process that is gone would fail in its own words, or never.)

JAX's runtime has heartbeats of its own, which do not replace this. Without it nobody tells in a
line which process is gone and what stands: the others end in the runtime's words, or in those of
the collective operation that has failed. And processes that are about to run different
configurations are not refused before they start.

Only the standard library is used: all this happens before JAX starts.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any

from fedqsn_jax.config.schema import ConfigError

GATHERING_SECONDS = 40.0
"""How long the processes wait for each other at the start."""

SILENCE_SECONDS = 30.0
"""After so long without a beat a process counts as gone."""

_BEAT_SECONDS = 2.0
_RETRY_SECONDS = 0.2
_BEAT, _FAREWELL, _LOST = b".", b"bye", b"lost "

Facts = dict[str, Any]
"""What has to be the same in all processes, by name; JSON values."""


class Lifeline:
    """Open connections between process 0 and each other one, watched until the farewell."""

    def __init__(self, index: int, peers: dict[int, socket.socket]) -> None:
        self._index = index
        self._peers = peers
        self._over = threading.Event()
        self._gone: set[int] = set()
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Starts to watch, and to beat, in the background."""
        for peer in self._peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def farewell(self) -> None:
        """Tells the others that this process ends as it should, and watches no longer."""
        self._over.set()
        self._tell(_FAREWELL)

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            self._tell(_BEAT)

    def _tell(self, message: bytes) -> None:
        with self._lock:
            for connection in self._peers.values():
                # What is broken is found by whoever listens to it.
                with contextlib.suppress(OSError):
                    connection.sendall(message + b"\n")

    def _listen(self, peer: int) -> None:
        connection = self._peers[peer]
        connection.settimeout(SILENCE_SECONDS)
        lost = peer
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = line.strip()
                    if message == _FAREWELL:
                        return
                    if message.startswith(_LOST):
                        lost = int(message.removeprefix(_LOST))
                        break
        except OSError:
            pass
        if not self._over.is_set():
            self._end(lost)

    def _end(self, lost: int) -> None:
        """Ends this process: its main thread may be waiting for what will never come."""
        self._over.set()
        # In one system call, so that lines of several processes do not mix.
        message = (
            f"fedqsn_jax: process {self._index}: process {lost} is gone; the last checkpoint "
            f"stands, start all processes again to go on from there\n"
        )
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        self._tell(_LOST + str(lost).encode())
        os._exit(1)


def gather(address: str, count: int, index: int, facts: Facts) -> Lifeline:
    """Waits until all processes are there and agree.

    Args:
      address: ``HOST:PORT`` of process 0.
      count: Number of processes, at least 2.
      index: Which one this is.
      facts: What has to be the same in all.

    Returns:
      The connections; they are not watched yet.

    Raises:
      ConfigError: Someone did not come, came twice, or is about to run something else; every
        process that came is told.
    """
    host, port = split_address(address)
    if index == 0:
        return Lifeline(0, _receive(host, port, count, facts))
    return Lifeline(index, {0: _join(host, port, count, index, facts)})


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port.

    Raises:
      ConfigError: It is not of the form ``HOST:PORT``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator_address={address}: allowed is HOST:PORT")
    return host.strip("[]"), int(port)


def _receive(host: str, port: int, count: int, facts: Facts) -> dict[int, socket.socket]:
    deadline = time.monotonic() + GATHERING_SECONDS
    peers: dict[int, socket.socket] = {}
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((host, port), family=family, backlog=count)
    except OSError as error:
        raise ConfigError(
            f"--coordinator_address={host}:{port}: process 0 cannot listen there ({error.strerror})"
        ) from error
    with server:
        while len(peers) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [n for n in range(1, count) if n not in peers]
                raise _refused(
                    peers.values(),
                    f"--num_processes={count}: process(es) {', '.join(map(str, missing))} did not "
                    f"come within {GATHERING_SECONDS:.0f} seconds",
                ) from None
            # A stranger that says nothing must not hold up the others.
            connection.settimeout(5.0)
            try:
                hello = _read(connection)
                theirs, they = int(hello["count"]), int(hello["index"])
                difference = _difference(facts, hello["facts"], they)
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()
                continue
            everyone = [*peers.values(), connection]
            if theirs != count:
                raise _refused(
                    everyone,
                    f"--num_processes={theirs} of process {they}: process 0 has {count}",
                )
            if they in peers or not 0 < they < count:
                raise _refused(everyone, f"--process_id={they}: two processes have it")
            if difference:
                raise _refused(everyone, difference)
            peers[they] = connection
    for connection in peers.values():
        _write(connection, {"error": ""})
    return peers


def _join(host: str, port: int, count: int, index: int, facts: Facts) -> socket.socket:
    deadline = time.monotonic() + GATHERING_SECONDS
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5.0)
            connection.settimeout(GATHERING_SECONDS)
            _write(connection, {"count": count, "index": index, "facts": facts})
            answer = _read(connection)
            break
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--coordinator_address={host}:{port}: process {index} did not reach process 0 "
                    f"there within {GATHERING_SECONDS:.0f} seconds ({_reason(error)})"
                ) from error
            time.sleep(_RETRY_SECONDS)
    if answer["error"]:
        raise ConfigError(answer["error"])
    return connection


def _refused(connections: Any, message: str) -> ConfigError:
    for connection in connections:
        with contextlib.suppress(OSError):
            _write(connection, {"error": message})
            connection.close()
    return ConfigError(message)


def _difference(ours: Facts, theirs: Facts, they: int) -> str:
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return (
                f"{name} = {theirs.get(name)!r} in process {they}, but {ours.get(name)!r} in "
                f"process 0: allowed is the same in all"
            )
    return ""


def _write(connection: socket.socket, value: Any) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _read(connection: socket.socket) -> Any:
    """Reads a line, byte by byte: what follows it is for others to read."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 1 << 20:
            raise ValueError("closed")
        line += byte
    return json.loads(line)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
