"""A client's training process, which stays between messages.

Flower starts a program for each message, and for each of them JAX would be imported and the
training traced anew: most of what a small round takes. So the first of these programs starts a
process that trains, and hands it the message over a Unix socket in a directory of the user's own;
the next ones find it there. It ends by itself when the SuperNode has ended, when nothing has come
for some time, or when the program that waits for it goes away.

Only the standard library is imported here, till the process begins to train.
"""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fedqsn_jax.deploy.outcome import Outcome

_IDLE = 900.0
"""Seconds without a message after which the process ends; its rows and programs are in memory."""
_LONGEST_BASE = 50
"""Bytes of a directory for the sockets; what follows it has up to forty."""
_LOOK = 1.0
"""Seconds between two looks whether the SuperNode is there."""


class WorkerError(Exception):
    """The process that trains has died, or has not answered in time; the text tells no value."""


def ask(settings_file: str, payload: bytes, told: Mapping[str, Any], seconds: float) -> Outcome:
    """Lets the training process take part in a round; it is started if it is not there.

    Args:
      settings_file: The client's own settings.
      payload: What the server sent.
      told: What came with it.
      seconds: How long to wait; the process is ended then.

    Raises:
      WorkerError: There is no answer.
    """
    deadline = time.monotonic() + seconds
    place = _place(os.getppid(), settings_file)
    with contextlib.closing(_connected(place, deadline)) as connection:
        try:
            connection.send((settings_file, dict(told)))
            connection.send_bytes(payload)
            if not connection.poll(max(deadline - time.monotonic(), 0)):
                _kill(place)
                raise WorkerError("it did not answer in time")
            outcome = connection.recv()
            return outcome._replace(payload=connection.recv_bytes())
        except (EOFError, OSError) as error:
            _kill(place)
            raise WorkerError("its training process died") from error


def _place(owner: int, settings_file: str) -> Path:
    """The socket's path: of this user, of a SuperNode's process and of a settings file."""
    base = tempfile.gettempdir()
    # A socket's path may have about a hundred bytes, and some machines' directories are longer.
    if len(os.fsencode(base)) > _LONGEST_BASE:
        base = "/tmp"
    directory = Path(base) / f"fedqsn-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    facts = directory.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise WorkerError("the directory of its sockets is open to others")
    # What others may name as they like is no part of the path.
    digest = hashlib.blake2b(os.path.abspath(settings_file).encode(), digest_size=8).hexdigest()
    return directory / f"{owner}-{digest}"


def _connected(place: Path, deadline: float) -> Connection:
    """A connection to the process, which is started if there is none."""
    started = None
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            client = socket.socket(socket.AF_UNIX)
            try:
                client.connect(str(place))
            except OSError:
                client.close()
                raise
            return Connection(client.detach())
        if started is None:
            started = subprocess.Popen(
                [sys.executable, "-m", __name__, str(place), str(os.getppid())],
                stdin=subprocess.DEVNULL,
            )
        elif started.poll() is not None:
            raise WorkerError("its training process ended at once")
        time.sleep(0.02)
    raise WorkerError("its training process did not start in time")


def _kill(place: Path) -> None:
    """Ends the process; the next message starts another."""
    place.unlink(missing_ok=True)
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(place.with_suffix(".pid").read_text()), signal.SIGKILL)


def serve(place: Path, owner: int) -> None:
    """Serves messages one after the other, until the SuperNode ends or nothing comes.

    Args:
      place: The socket's path.
      owner: The process without which this one ends.
    """
    listener = _listening(place)
    try:
        from fedqsn_jax.deploy.work import take_part

        deadline = time.monotonic() + _IDLE
        while _is_there(owner) and time.monotonic() < deadline:
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                continue
            accepted.setblocking(True)
            with (
                contextlib.closing(Connection(accepted.detach())) as connection,
                contextlib.suppress(EOFError, ConnectionError),
            ):
                _serve_one(connection, take_part)
            deadline = time.monotonic() + _IDLE
    finally:
        listener.close()
        for file in (place, place.with_suffix(".pid")):
            file.unlink(missing_ok=True)


def _serve_one(connection: Connection, take_part: Callable[..., Outcome]) -> None:
    settings_file, told = connection.recv()
    payload = connection.recv_bytes()
    with _watched(connection):
        outcome = take_part(settings_file, payload, told, _tell)
    connection.send(outcome._replace(payload=b""))
    connection.send_bytes(outcome.payload)


def _listening(place: Path) -> socket.socket:
    """The socket, its path there only once it takes connections."""
    for left in place.parent.glob("*-*"):
        # Of a process that was killed, and whose SuperNode is gone.
        number = left.name.partition("-")[0]
        if number.isdecimal() and not _is_there(int(number)):
            left.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    temporary = place.with_suffix(f".{os.getpid()}")
    listener.bind(str(temporary))
    listener.listen()
    listener.settimeout(_LOOK)
    place.with_suffix(".pid").write_text(str(os.getpid()))
    os.replace(temporary, place)
    return listener


@contextlib.contextmanager
def _watched(connection: Connection) -> Iterator[None]:
    """Ends this process when who has asked goes away: nobody wants the answer any more."""
    done = threading.Event()

    def watch() -> None:
        # Once it is done the connection is closed.
        with contextlib.suppress(OSError, ValueError):
            while not done.is_set():
                # Nothing is sent before the answer: there is only an end to be read.
                if wait([connection], timeout=_LOOK) and not done.is_set():
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _is_there(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _tell(text: str) -> None:
    print(f"fedqsn_jax: {text}", flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
