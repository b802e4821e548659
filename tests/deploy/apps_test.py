"""The programs that Flower starts, called with Flower's own messages and a grid in memory."""

import faulthandler
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from deploy_cases import CLIENT_ROWS, CLIENTS, PRIVATE, TEST, configured

pytest.importorskip("flwr", reason="Flower's programs need the extra: pip install '.[deploy]'")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedqsn_jax.deploy import client_app, messages, server_app, work, worker
from fedqsn_jax.deploy.client_files import write_client
from fedqsn_jax.deploy.outcome import SETTINGS
from fedqsn_jax.deploy.processes import SETTINGS_VARIABLE
from fedqsn_jax.deploy.server_files import RowSources, write_server
from fedqsn_jax.deploy.worker import WorkerError
from fedqsn_jax.runs.working_directory import WorkDirectory

pytestmark = pytest.mark.usefixtures("quick_compilation")


def context(**node_config):
    return Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={})


def addressed(message: Message, number: int) -> Message:
    """A message as it is under way: with the name that a grid gives it."""
    message.metadata.__dict__["_message_id"] = f"message {number}"
    return message


class MemoryGrid:
    """Nodes that are calls of the client's program; ``change`` may replace a reply, or drop it.

    Attributes:
      pushed: The numbers of messages of each push.
      sent: All messages.
    """

    def __init__(self, settings: list[Path], keys: bool = True, change=None) -> None:
        self._settings = dict(enumerate(settings, start=11))
        self._keys = keys
        self._change = change or (lambda node, message, reply: reply)
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count()
        self.pushed: list[int] = []
        self.sent: list[Message] = []

    def get_nodes(self):
        return [
            SimpleNamespace(node_id=node, public_key=bytes([node]) * 4 if self._keys else b"")
            for node in self._settings
        ]

    def push_messages(self, given):
        given = list(given)
        self.pushed.append(len(given))
        for message in given:
            addressed(message, next(self._numbers))
            self.sent.append(message)
            node = message.metadata.dst_node_id
            own = context(**{SETTINGS: str(self._settings[node])})
            reply = self._change(node, message, client_app.app(message, own))
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in given]

    def pull_messages(self, names):
        return [self._replies.pop(name) for name in names if name in self._replies]


@pytest.fixture(autouse=True)
def task_identity(monkeypatch):
    """What Flower's own programs set before they call ours: without it no message can be made."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(autouse=True)
def worker_here(monkeypatch):
    """What the training process does is done in the tests'."""

    def ask(settings, payload, told, seconds):
        return work.take_part(settings, payload, told, lambda text: print(f"fedqsn_jax: {text}"))

    monkeypatch.setattr(worker, "ask", ask)


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """When a client's process would end if it hung: here it would be that of the tests."""
    calls = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, **rest: calls.append((seconds, rest))
    )
    monkeypatch.setattr(
        faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled")
    )
    return calls


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The files of a server and of three clients, the server's named by the environment."""
    for name, rows in (("private", PRIVATE), ("test", TEST)):
        np.savez(tmp_path / f"{name}.npz", **rows)
    settings = tmp_path / "server" / "server.json"
    write_server(
        configured(rounds=2),
        RowSources(f"npz:{tmp_path / 'private.npz'}", f"npz:{tmp_path / 'test.npz'}"),
        clients=CLIENTS,
        directory=tmp_path / "run",
        settings=settings,
    )
    values = json.loads(settings.read_text())
    # Compiled programs are not kept: the tests' process would keep those of all later tests too.
    del values["cache"]
    settings.write_text(json.dumps({**values, "wait_clients": 1, "wait_answers": 1}))
    monkeypatch.setenv(SETTINGS_VARIABLE, str(settings))
    for number, rows in enumerate(CLIENT_ROWS):
        np.savez(tmp_path / f"{number}.npz", **rows)
        write_client(f"npz:{tmp_path / f'{number}.npz'}", tmp_path / f"{number}.toml")
        only_rows = (tmp_path / f"{number}.toml").read_text().splitlines()[0]
        (tmp_path / f"{number}.toml").write_text(only_rows + "\n")
    return tmp_path


def clients_of(place):
    return [place / f"{number}.toml" for number in range(CLIENTS)]


def run(grid, place):
    """Runs the server's program; returns its outcome and what its display has shown."""
    server_app.app(grid, context())
    outcome = json.loads((place / "server" / "outcome.json").read_text())
    log = place / "server" / "server.log"
    return outcome, " ".join(log.read_text().split()) if log.exists() else ""


def history(place):
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_both_programs_run_a_federation(place, watched):
    grid = MemoryGrid(clients_of(place))
    outcome, told = run(grid, place)
    assert outcome == {"finished": True}
    assert [entry["clients/returned"] for entry in history(place)[1:]] == [3, 3]
    assert "accuracy of each view" in told
    # One message after the other, so that payloads are not held together.
    assert grid.pushed == [1] * 6
    # Clients are told by their keys, and what travels is counted.
    numbers = json.loads((place / "run" / "clients.json").read_text())
    assert sorted(numbers) == [f"key:{bytes([node]).hex() * 4}" for node in (11, 12, 13)]
    down = [len(messages.read_task(message)[0]) for message in grid.sent]
    assert history(place)[1]["bytes/down_per_client"] == sum(down[:3]) / 3
    for message in grid.sent:
        assert set(message.content["task"]) == {"plan", "token", "key"}
        assert message.metadata.ttl == 1
    # A client's process ends when the server does not wait any more, and only then.
    assert watched == [(6, {"exit": True, "file": 2}), "cancelled"] * 6


def error(message):
    return Message(Error(2, "rows of the client's: 42"), reply_to=message)


def strange(message):
    return Message(RecordDict({"other": ConfigRecord({"a": 1})}), reply_to=message)


def without_bytes(message):
    content = {"payload": ArrayRecord({}), "answer": ConfigRecord({"token": b""})}
    return Message(RecordDict(content), reply_to=message)


# By node and round, what comes instead of an answer, and how the server calls it.
REPLIES = {
    (12, 1): (error, "its program failed (code 2)"),
    (13, 1): (strange, "neither an answer nor a refusal"),
    (12, 2): (without_bytes, "neither an answer nor a refusal"),
    (13, 2): (lambda message: None, "did not answer in time"),
}


def test_replies_that_are_none_are_named_and_the_others_counted(place):
    rounds = dict.fromkeys((11, 12, 13), 0)

    def change(node, message, reply):
        rounds[node] += 1
        make, _ = REPLIES.get((node, rounds[node]), (None, ""))
        return reply if make is None else make(message)

    outcome, told = run(MemoryGrid(clients_of(place), change=change), place)
    assert outcome == {"finished": True}
    for (node, number), (_, words) in REPLIES.items():
        lines = told.split(f"round {number}: client {node - 11} ")
        assert len(lines) == 2
        assert words in lines[1][:70]
    assert "rows of the client's" not in told
    assert [entry["clients/returned"] for entry in history(place)[1:]] == [1, 1]


def test_a_client_whose_rows_do_not_fit_says_why_on_its_own_side_only(place, capsys):
    wide = {**CLIENT_ROWS[1], "image": np.full((14, 7), 1234.5, np.float32)}
    np.savez(place / "1.npz", **wide)
    outcome, told = run(MemoryGrid(clients_of(place), keys=False), place)
    assert outcome == {"finished": True}
    # Without registered keys nodes are told by their numbers.
    numbers = json.loads((place / "run" / "clients.json").read_text())
    assert sorted(numbers) == ["node:11", "node:12", "node:13"]
    assert "it says that it cannot take part: its own settings or rows do not fit" in told
    assert str(place / "1.npz") not in told
    assert "the task needs float32[6]" in capsys.readouterr().out


def test_what_a_client_refuses_it_tells_in_words_without_values(place, monkeypatch, capsys):
    caught = []

    def change(node, message, reply):
        caught.append(message)
        return reply

    run(MemoryGrid(clients_of(place), change=change), place)
    capsys.readouterr()
    payload, task = messages.read_task(caught[0])
    plan = json.loads(task["plan"])

    def answered(settings, **changed):
        """The reason that the server learns, and what the client's own side tells."""
        content = messages.task(payload, {**task, **changed})
        message = addressed(Message(content, dst_node_id=11, message_type="train"), 99)
        reply = client_app.app(message, context(**settings))
        return messages.read_answer(reply), capsys.readouterr().out

    own = {SETTINGS: str(place / "0.toml")}
    reason, line = answered(own, plan=json.dumps({**plan, "version": 77}))
    assert reason == "what it received cannot be read"
    assert "version 77" in line
    assert "install the same fedqsn_jax" in line
    assert line.count("\n") == 1

    reason, line = answered({})
    assert reason == "its own settings or rows do not fit"
    assert f"no {SETTINGS!r}" in line

    def failing(*arguments):
        raise RuntimeError("a row: 31.25")

    monkeypatch.setattr(work, "check_rows", failing)
    reason, line = answered(own)
    assert reason == "a RuntimeError"
    assert "31.25" in line

    def gone(*arguments):
        raise WorkerError("its training process died")

    monkeypatch.setattr(worker, "ask", gone)
    assert answered(own) == ("its training process died", "")


def test_a_server_whose_directory_is_of_another_run_says_so(place, capsys):
    work = WorkDirectory(place / "run")
    with work.claim(configured()):
        work.write_config(configured(p1=0.1))
    grid = MemoryGrid(clients_of(place))
    outcome, _ = run(grid, place)
    assert "--workdir" in outcome["refused"]
    assert grid.sent == []
    [line] = capsys.readouterr().err.splitlines()
    assert outcome["refused"] in line


def test_records_hold_any_bytes():
    for payload in (b"", b"\x00\xff" * 1000):
        message = Message(
            messages.task(payload, {"plan": "{}", "token": b"\x00", "key": [1, 2]}),
            dst_node_id=1,
            message_type="train",
        )
        read, told = messages.read_task(message)
        assert read == payload
        assert told == {"plan": "{}", "token": b"\x00", "key": [1, 2]}
