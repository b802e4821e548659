"""A deployment of real processes on loopback, with faults that can be asked for."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedqsn_jax.config.schema import Config
from fedqsn_jax.deploy import processes
from fedqsn_jax.deploy.bundle import write_bundle
from fedqsn_jax.deploy.client_files import write_client
from fedqsn_jax.deploy.server_files import RowSources, write_server

# Rows that do what the file "fault" beside them says, once.
_MISBEHAVING = """
import os, signal, time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def rows():
    with np.load(HERE / "rows.npz") as arrays:
        found = dict(arrays)
    if not (HERE / "fault").exists():
        return found
    fault = (HERE / "fault").read_text()
    (HERE / "fault").unlink()
    if fault == "not finite":
        found["image"] = np.full_like(found["image"], np.nan)
        return found
    # The rows are read in the client's process: there its training can be replaced.
    from fedqsn_jax.deploy import client

    whole = client.Client.answer

    def answer(self, *arguments):
        client.Client.answer = whole
        result = self.answer(*arguments)
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(100_000)
        payload = b"garbage"
        if fault == "another model":
            # The bytes that tell a model's structure; see `protocol.wire`.
            payload = result.payload[:8] + bytes(16) + result.payload[24:]
        return client.Answer(payload, result.examples, result.loss)

    client.Client.answer = answer
    return found
"""


# A client's program that keeps its answers, and sends the last one again when it is asked to.
_REPLAYING = """
import pickle
from pathlib import Path

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedqsn_jax.deploy import client_app, messages

app = ClientApp()


@app.train()
def train(message, context):
    place = Path(context.node_config["fedqsn-client"])
    kept, asked = place.with_name("answer"), place.with_name("replay")
    if asked.exists():
        asked.unlink()
        return Message(messages.answer(*pickle.loads(kept.read_bytes())), reply_to=message)
    reply = client_app.app(message, context)
    read = messages.read_answer(reply)
    if not isinstance(read, str):
        kept.write_bytes(pickle.dumps(read))
    return reply
"""


class Deployment:
    """A server's and its clients' files, and the programs that were started.

    Attributes:
      place: Where everything lies: ``server/``, ``run/`` (the working directory), ``NAME/`` of
        each client.
    """

    def __init__(
        self, place: Path, config: Config, rows: dict[str, dict], wait_answers: float
    ) -> None:
        """Writes the files: ``rows`` are "private", "test", and each client's by its name."""
        self.place = place
        self._running = contextlib.ExitStack()
        self._options: tuple[list[str], list[str]] = ([], [])
        self._started: dict[str, subprocess.Popen] = {}
        self.port = processes.free_port()
        for name in ("private", "test"):
            np.savez(place / f"{name}.npz", **rows[name])
        sources = RowSources(*(f"npz:{place / f'{name}.npz'}" for name in ("private", "test")))
        self.settings = place / "server" / "server.json"
        names = [name for name in rows if name not in ("private", "test")]
        write_server(
            config,
            sources,
            clients=len(names),
            directory=place / "run",
            settings=self.settings,
        )
        values = json.loads(self.settings.read_text())
        values["wait_answers"] = wait_answers
        self.settings.write_text(json.dumps(values))
        for name in names:
            own = place / name
            own.mkdir()
            np.savez(own / "rows.npz", **rows[name])
            (own / "own.py").write_text(_MISBEHAVING)
            write_client(f"python:{own / 'own.py'}:rows", own / "client.toml")
        self.bundle = write_bundle(place / "server")
        self.home = place / "server" / "flower"
        processes.name_superlink(self.home, self.port)
        self.environment = processes.flower_environment(self.home, self.settings)

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()

    def use_certificates(self) -> None:
        """Makes an authority and the SuperLink's certificate; nodes need registered keys then."""
        own, address = self.place / "server", f"IP:{processes.LOOPBACK}"
        make_authority(own, "ca")
        _run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-keyout", own / "server.key",
             "-out", own / "server.csr", "-subj", "/CN=superlink")  # fmt: skip
        (own / "names").write_text(f"subjectAltName={address},DNS:localhost\n")
        _run("openssl", "x509", "-req", "-in", own / "server.csr", "-CA", own / "ca.pem", "-CAkey",
             own / "ca.key", "-CAcreateserial", "-out", own / "server.pem", "-days", "2",
             "-extfile", own / "names")  # fmt: skip
        self._options = (
            [
                f"--ssl-certfile={own / 'server.pem'}",
                f"--ssl-keyfile={own / 'server.key'}",
                f"--ssl-ca-certfile={own / 'ca.pem'}",
                "--enable-supernode-auth",
                f"--database={own / 'flower.db'}",
            ],
            [f"--root-certificates={own / 'ca.pem'}"],
        )
        processes.name_superlink(self.home, self.port, own / "ca.pem")

    def start_link(self) -> None:
        log = self.place / "superlink.log"
        command = processes.superlink(self.port, *self._options[0])
        started = self._running.enter_context(processes.process(command, self.environment, log))
        self._started["link"] = started
        processes.wait_for_port(self.port, started, log)

    def register(self, name: str) -> None:
        """Makes a client's key and registers it, by the commands of the page."""
        _run("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", self.key(name))
        command = [processes.program("flwr"), "supernode", "register", f"{self.key(name)}.pub"]
        _run(*command, "fedqsn", environment=self.environment)

    def key(self, name: str) -> Path:
        return self.place / name / "key"

    def start_node(
        self,
        name: str,
        port: int | None = None,
        authority: Path | None = None,
        key: Path | None = None,
    ) -> subprocess.Popen:
        """Starts a client's SuperNode: to another port, or with other files, where given."""
        options = list(self._options[1])
        if authority is not None:
            options = [f"--root-certificates={authority}"]
        if options:
            options.append(f"--auth-supernode-private-key={key or self.key(name)}")
        command = processes.supernode(
            port or self.port, self.place / name / "client.toml", *options
        )
        environment = processes.flower_environment(self.place / name / "flower")
        started = self._running.enter_context(
            processes.process(command, environment, self.node_log(name))
        )
        self._started[name] = started
        return started

    def node_log(self, name: str) -> Path:
        return self.place / f"{name}.log"

    def start_run(self) -> subprocess.Popen:
        command = [processes.program("flwr"), "run", str(self.bundle), "fedqsn", "--stream"]
        return self._running.enter_context(
            processes.process(command, self.environment, self.place / "flwr.log")
        )

    def kill(self, name: str) -> None:
        """Kills a node, or the ``link`` with its server's program, by -9: with all it started."""
        started = self._started.pop(name)
        for number in [started.pid, *processes.descendants(started.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        started.wait()

    def ask_for(self, name: str, fault: str) -> None:
        (self.place / name / "fault").write_text(fault)

    def keep_answers(self) -> None:
        """Lets clients keep their answers, so that `replay` can be asked for."""
        (self.bundle / "fedqsn_app" / "client.py").write_text(_REPLAYING)

    def replay(self, name: str) -> None:
        """Lets a client send its last answer once more, in place of the next."""
        (self.place / name / "replay").write_text("")

    def told(self) -> str:
        """What the server's display has shown, its lines joined."""
        log = self.settings.with_name("server.log")
        return " ".join(log.read_text().split()) if log.exists() else ""

    def history(self) -> list[dict]:
        file = self.place / "run" / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def saved(self) -> int:
        """The last round of which there is a whole checkpoint, or -1."""
        names = [path.name for path in (self.place / "run" / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=-1)

    def outcome(self) -> dict:
        """How the run ended, or nothing so far."""
        file = self.settings.with_name("outcome.json")
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads(file.read_text())
        return {}

    def peaks_of_server(self) -> dict[str, int]:
        """Peak resident memory so far, in KB, of the SuperLink and of the server's program."""
        link = self._started["link"].pid
        found = {}
        for number in [link, *processes.descendants(link)]:
            with contextlib.suppress(OSError, AttributeError):
                command = Path(f"/proc/{number}/cmdline").read_bytes()
                status = Path(f"/proc/{number}/status").read_text()
                peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
                if number == link:
                    found["SuperLink"] = peak
                elif b"flwr-serverapp" in command:
                    found["server"] = peak
        return found

    def clients_at_work(self, name: str) -> list[int]:
        """The processes that a node has started for messages."""
        found = []
        for number in processes.descendants(self._started[name].pid):
            with contextlib.suppress(OSError):
                if b"flwr-clientapp" in Path(f"/proc/{number}/cmdline").read_bytes():
                    found.append(number)
        return found


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Fails if a condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} seconds"
        time.sleep(0.3)


def make_authority(directory: Path, name: str) -> Path:
    """Makes an authority that signs certificates; returns its own."""
    certificate = directory / f"{name}.pem"
    _run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout",
         directory / f"{name}.key", "-out", certificate, "-days", "2",
         "-subj", f"/CN={name}")  # fmt: skip
    return certificate


def _run(*command: object, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


class Relay:
    """A relay to a port of loopback that keeps all bytes that come back from it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((processes.LOOPBACK, 0))
        self.port = self._listener.getsockname()[1]
        self._received: list[bytearray] = []
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> "Relay":
        self._threads[0].start()
        return self

    def __exit__(self, *error: object) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def received(self) -> bytes:
        """Everything that came back so far, one connection after the other."""
        return b"\n".join(bytes(each) for each in self._received)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection((processes.LOOPBACK, self._target))
            except OSError:
                return
            self._sockets += [near, far]
            kept = bytearray()
            self._received.append(kept)
            for source, sink, record in ((near, far, None), (far, near, kept)):
                thread = threading.Thread(target=_pump, args=(source, sink, record))
                self._threads.append(thread)
                thread.start()


def _pump(source: socket.socket, sink: socket.socket, record: bytearray | None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if record is not None:
                record += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
