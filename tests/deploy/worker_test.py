"""The process that trains: what the program that asks it makes of one that dies or hangs."""

import os
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import pytest

from fedqsn_jax.deploy import worker

# A stand-in for `work`, which would import JAX: what it does stands in the message.
_WORK = """
import os, time
from fedqsn_jax.deploy.outcome import Outcome

calls = 0

def take_part(settings_file, payload, told, tell):
    global calls
    calls += 1
    if told["do"] == "die":
        os._exit(9)
    if told["do"] == "hang":
        time.sleep(1000)
    tell("said")
    return Outcome(payload[::-1] * told["times"], calls, os.getpid() * 1.0)
"""


@pytest.fixture
def place():
    """A directory whose path is short, as those of sockets must be."""
    with tempfile.TemporaryDirectory(prefix="w") as folder:
        yield Path(folder)


@pytest.fixture
def asked(tmp_path, place, monkeypatch):
    """`worker.ask` of a process that works as above, in a directory of the test's own."""
    (tmp_path / "stand_in.py").write_text(
        "import sys, types\n"
        f"module = types.ModuleType('fedqsn_jax.deploy.work')\nexec({_WORK!r}, module.__dict__)\n"
        "sys.modules['fedqsn_jax.deploy.work'] = module\n"
        "from pathlib import Path\n"
        "from fedqsn_jax.deploy import worker\n"
        "worker.serve(Path(sys.argv[-2]), int(sys.argv[-1]))\n"
    )
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(worker.tempfile, "tempdir", None)
    monkeypatch.setattr(os, "getppid", os.getpid)
    started = []
    whole = subprocess.Popen

    def start(command, **options):
        started.append(whole([sys.executable, tmp_path / "stand_in.py", *command[-2:]], **options))
        return started[-1]

    monkeypatch.setattr(worker.subprocess, "Popen", start)
    yield lambda do="answer", seconds=30.0, times=1, payload=b"abc": worker.ask(
        "client.toml", payload, {"do": do, "times": times}, seconds
    )
    for process in started:
        process.kill()
        process.wait()


def test_one_process_answers_all_messages_and_is_replaced_when_it_dies(asked, place):
    first, second = asked(), asked(payload=b"", times=3)
    assert (first.payload, first.examples) == (b"cba", 1)
    assert (second.payload, second.examples, second.loss) == (b"", 2, first.loss)
    large = asked(payload=bytes(range(256)) * 40_000, times=2)
    assert large.payload == (bytes(range(256)) * 40_000)[::-1] * 2
    with pytest.raises(worker.WorkerError, match="died"):
        asked("die")
    assert asked().examples == 1
    # One that hangs is ended when the time is up, and does not keep the next message.
    began = time.monotonic()
    with pytest.raises(worker.WorkerError, match="in time"):
        asked("hang", seconds=1.0)
    assert time.monotonic() - began < 10
    assert asked().examples == 1
    [directory] = place.glob("fedqsn-*")
    assert directory.stat().st_mode & 0o777 == 0o700
    # What processes have left whose SuperNode is gone is cleared away by the next.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (directory / f"{gone.pid}-0.pid").write_text("1")
    with pytest.raises(worker.WorkerError, match="died"):
        asked("die")
    asked()
    assert {file.name.partition("-")[0] for file in directory.iterdir()} == {str(os.getpid())}


def test_it_ends_with_the_supernode(place, monkeypatch):
    stand_in = types.ModuleType("fedqsn_jax.deploy.work")
    stand_in.take_part = None
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    serving = threading.Thread(
        target=_serve, args=(place / "socket", owner.pid, monkeypatch), daemon=True
    )
    serving.start()
    serving.join(timeout=0.5)
    assert serving.is_alive()
    owner.kill()
    owner.wait()
    serving.join(timeout=60)
    assert not serving.is_alive()
    assert list(place.glob("socket*")) == []


def _serve(place: Path, owner: int, monkeypatch) -> None:
    monkeypatch.setattr(worker, "_LOOK", 0.1)
    worker.serve(place, owner)


def test_a_directory_that_is_open_to_others_is_not_used(asked, place):
    directory = place / f"fedqsn-{os.getuid()}"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(worker.WorkerError, match="open to others"):
        asked()
