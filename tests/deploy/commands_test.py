"""The commands of a server and of a client write private files, and answer mistakes in a line."""

import json
import os
import socket
import sys
import tomllib

import numpy as np
import pytest
from deploy_cases import CLASSES, CLIENT_ROWS, CLIENTS, PRIVATE, TEST, configured

from fedqsn_jax.config.schema import resolve, to_dict
from fedqsn_jax.deploy import client_files, processes
from fedqsn_jax.deploy.__main__ import main
from fedqsn_jax.deploy.plan import Plan
from fedqsn_jax.deploy.rows import read_rows
from fedqsn_jax.protocol.wire import VERSION
from fedqsn_jax.runs.working_directory import WorkDirectory

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = """
from fedqsn_jax.config import default_config

def get_config():
    config = default_config()
    config.model.hidden = (10, 8)
    config.cohort.size = 3
    config.evaluation.attackers = (1,)
    config.p1 = config.p2 = 0.3
    config.seed = 123456789
    return config
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a configuration and rows, and Flower as if it were there."""
    monkeypatch.setattr(processes, "require_flower", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(CONFIG)
    np.savez(tmp_path / "private.npz", **PRIVATE)
    np.savez(tmp_path / "test.npz", **TEST)
    np.savez(tmp_path / "rows.npz", **CLIENT_ROWS[0])
    return tmp_path


def server(*options):
    given = {
        "--config": "small.py",
        "--workdir": "run",
        "--private": "npz:private.npz",
        "--test": "npz:test.npz",
        "--clients": str(CLIENTS),
        "--port": str(processes.free_port()),
        **dict(option.split("=", 1) for option in options),
    }
    return main(["server", *(f"{name}={value}" for name, value in given.items())])


def refusal(capsys, code):
    """The one line that a refused command tells."""
    assert code == 2
    told = capsys.readouterr()
    assert told.out == ""
    [line] = told.err.splitlines()
    return line


def test_a_server_is_written_and_fits_its_clients(place, capsys):
    assert server() == 0
    settings = place / "run.server" / "server.json"
    assert settings.stat().st_mode & 0o777 == 0o600
    assert settings.parent.stat().st_mode & 0o777 == 0o700
    assert not (place / "run").exists()
    values = json.loads(settings.read_text())
    config = resolve(values["config"])
    assert config.seed == 123456789
    assert (values["clients"], values["classes"]) == (CLIENTS, CLASSES)
    for name, rows in (("private", PRIVATE), ("test", TEST)):
        found = read_rows(values[name])
        np.testing.assert_array_equal(found["image"], rows["image"])
    printed = capsys.readouterr().out
    assert f"FEDQSN_SERVER={settings}" in printed
    plan = settings.with_name("plan.json").read_text()
    assert "123456789" not in plan + printed
    # What the server tells serves the client's command.
    command = ["client", "--rows=npz:rows.npz", "--plan=run.server/plan.json", "--out=client.toml"]
    assert main(command) == 0
    written = client_files.read_settings(str(place / "client.toml"))
    np.testing.assert_array_equal(read_rows(written["rows"])["label"], CLIENT_ROWS[0]["label"])
    assert os.path.isabs(tomllib.loads((place / "client.toml").read_text())["cache"])


def test_the_files_of_a_server_can_be_written_elsewhere(place):
    assert server("--settings=mine/own.json", "--config.rounds=7") == 0
    assert json.loads((place / "mine" / "own.json").read_text())["config"]["rounds"] == 7


def test_without_flower_a_line_tells_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flwr", None)
    for command in (
        ["client", "--rows=npz:x", "--out=y"],
        ["demo", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"],
        [
            *("server", "--config=configs/digits.py", "--private=npz:x", "--test=npz:y"),
            *("--clients=3", f"--workdir={tmp_path / 'run'}"),
        ],
    ):
        assert "pip install" in refusal(capsys, main(command))
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken(place, capsys):
    with socket.socket() as other:
        other.bind((processes.LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port={port}" in refusal(capsys, server(f"--port={port}"))
    assert not (place / "run.server").exists()


def test_a_port_that_cannot_be(place, capsys):
    assert "1 to 65535" in refusal(capsys, server("--port=70000"))


def test_a_working_directory_of_another_run(place, capsys):
    work = WorkDirectory(place / "run")
    with work.claim(configured()):
        assert "run" in refusal(capsys, server())
        work.write_config(configured())
    line = refusal(capsys, server())
    assert "--workdir" in line
    assert "seed" in line or "rounds" in line
    assert not (place / "run.server").exists()


def test_settings_where_others_may_enter(place, capsys):
    (place / "open").mkdir(mode=0o755)
    assert "0700" in refusal(capsys, server("--settings=open/server.json"))
    assert list((place / "open").iterdir()) == []


WRONG_ROWS = {
    "no labels": ({"image": TEST["image"]}, "'label'"),
    "labels that are no numbers": ({**TEST, "label": TEST["label"] + 0.5}, "'label'"),
    "of different lengths": ({**TEST, "label": TEST["label"][:-1]}, "rows"),
    "of another width": ({**TEST, "image": TEST["image"][:, :4]}, "'image' is float32[4]"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_rows_of_a_server_that_do_not_fit(name, place, capsys):
    rows, words = WRONG_ROWS[name]
    np.savez(place / "private.npz", **rows)
    line = refusal(capsys, server())
    assert "--private=npz:private.npz" in line
    assert words in line
    assert not (place / "run.server").exists()


@pytest.fixture
def plan(place):
    """The plan of a server."""
    assert server() == 0
    return place / "run.server" / "plan.json"


CLIENT_MISTAKES = {
    "absent": ("npz:none.npz", None, "none.npz"),
    "of no kind": ("rows.npz", None, "npz:FILE"),
    "another width": ("npz:wide.npz", "wide", "the task needs float32[6]"),
    "no such label": ("npz:wide.npz", "label", "0 to 2"),
    "a function that fails": ("python:own.py:failing", None, "KeyError"),
    "no function": ("python:own.py:other", None, "no function"),
}


@pytest.mark.parametrize("name", CLIENT_MISTAKES)
def test_rows_of_a_client_that_do_not_fit(name, place, plan, capsys):
    source, change, words = CLIENT_MISTAKES[name]
    wide = dict(CLIENT_ROWS[0])
    if change == "wide":
        wide["image"] = np.zeros((9, 7), np.float32)
    if change == "label":
        wide["label"] = wide["label"] + CLASSES
    np.savez(place / "wide.npz", **wide)
    (place / "own.py").write_text("def failing():\n    return {}['rows']\n")
    capsys.readouterr()
    line = refusal(capsys, main(["client", f"--rows={source}", f"--plan={plan}", "--out=c.toml"]))
    assert words in line
    assert f"--rows={source}" in line
    assert not (place / "c.toml").exists()


def test_versions_of_the_wire_format_that_differ(place, plan, capsys):
    told = json.loads(plan.read_text())
    plan.write_text(json.dumps({**told, "version": VERSION + 1}))
    capsys.readouterr()
    line = refusal(
        capsys, main(["client", "--rows=npz:rows.npz", f"--plan={plan}", "--out=c.toml"])
    )
    assert f"version {VERSION + 1}" in line
    assert "install the same fedqsn_jax" in line
    plan.write_text("[]")
    line = refusal(
        capsys, main(["client", "--rows=npz:rows.npz", f"--plan={plan}", "--out=c.toml"])
    )
    assert "no plan" in line


def test_a_mistake_in_the_options_is_a_line(capsys):
    assert "--rows" in refusal(capsys, main(["client", "--out=x"]))
    assert "invalid choice" in refusal(capsys, main(["sever"]))
    assert "--more" in refusal(capsys, main(["bundle", "--out=x", "--more"]))


def test_a_plan_holds_what_its_file_says(plan):
    told = Plan.decode(plan.read_text())
    assert told.classes == CLASSES
    assert told.rows == {"image": ((6,), "float32"), "label": ((), "int32")}
    assert to_dict(told.config())["p1"] == to_dict(resolve({}))["p1"]
