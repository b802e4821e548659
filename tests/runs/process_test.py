"""Runs as real processes: a fresh one, a kill -9, a SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from locations import ROOT
from orbax.checkpoint import v1 as orbax
from sweep_cases import sweep_file

from fedqsn_jax.cli.main import main
from fedqsn_jax.sweeps.results import SweepDirectory

ROUNDS = 28
ARGUMENTS = [
    "--config=configs/digits.py",
    f"--config.rounds={ROUNDS}",
    "--config.rounds_per_call=2",
    "--config.evaluation.every=2",
    "--config.evaluation.proxy_samples=2",
    "--config.evaluation.attackers=(2,)",
    "--config.checkpoint.every=4",
    "--config.pretraining.steps=20",
    "--config.client.steps=5",
    "--config.model.hidden=(32,)",
]


def start(directory: Path, command: str = "main", *arguments: str) -> subprocess.Popen:
    # Both compile the same program; the first one's work serves the other.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", f"fedqsn_jax.{command}"),
            *ARGUMENTS,
            f"--workdir={directory}",
            *arguments,
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(directory: Path) -> None:
    """Runs to the end in this process."""
    assert main([*ARGUMENTS, f"--workdir={directory}"]) == 0


def latest(directory: Path) -> int:
    """The latest round that is saved as a whole; -1 if none is."""
    names = [path.name for path in (directory / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def wait_for_checkpoint(directory: Path, first: int, process: subprocess.Popen) -> None:
    """Waits until the run has saved round ``first`` or a later one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if latest(directory) >= first:
            return
        assert process.poll() is None
        time.sleep(0.005)
    raise AssertionError("the run has saved nothing")


def metrics(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def saved_state(directory: Path) -> dict:
    path = directory / "checkpoints" / str(latest(directory))
    return orbax.load_checkpointables(path, {"state": None})["state"]


def test_an_interrupted_run_ends_as_an_uninterrupted_one_does(tmp_path):
    """Invariant 9: one run gets a kill -9, goes on, gets a SIGTERM, and goes on again.

    At first its output goes to a program that reads a line and ends.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(broken)
    process.stdout.readline()
    process.stdout.close()
    wait_for_checkpoint(broken, 4, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    after_kill = latest(broken)

    process = start(broken)
    wait_for_checkpoint(broken, after_kill + 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"resumed after round {after_kill}" in output
    assert "stopped after round" in output
    assert after_kill < latest(broken) < ROUNDS
    assert "\x1b" not in output
    finish(broken)
    finish(whole)

    assert metrics(broken) == metrics(whole)
    found, expected = saved_state(broken), saved_state(whole)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_sweep_that_gets_a_sigterm_leaves_what_is_finished(tmp_path):
    directory = tmp_path / "sweep"
    option = sweep_file(tmp_path, {"seed": list(range(1000))})
    process = start(directory, "sweep", option)
    files, deadline = SweepDirectory(directory), time.monotonic() + 120
    while len(files.read()) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert output.endswith(
        "fedqsn_jax: interrupted; finished points are kept, the same command runs the others\n"
    )
    for table, rows in ((files.points, len(files.read())), (files.table, 1)):
        assert table.read_text().count("\n") == 1 + rows


CTRL_C_WHILE_IMPORTING = """
import gc, os, runpy, signal, sys
_, module, directory = sys.argv
# As in a terminal: what a script starts with & ignores Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt(phase, info):
    os.kill(os.getpid(), signal.SIGINT)
class Finder:
    def find_spec(name, path=None, target=None):
        if name == module:
            gc.callbacks.append(interrupt)
            gc.collect()
sys.meta_path.insert(0, Finder)
sys.argv = ["main", "--config=configs/digits.py", "--workdir=" + directory]
runpy.run_module("fedqsn_jax.main", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "remains"),
    [("ml_collections", ""), ("optax", "; nothing was saved, the same command starts again")],
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(module, remains, tmp_path):
    """Also in a callback, where Python would forget it; not a run: it ends before it is one."""
    directory = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, "-c", CTRL_C_WHILE_IMPORTING, module, directory],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    line = f"fedqsn_jax: interrupted{remains}\n"
    assert (process.returncode, process.stdout, process.stderr) == (130, "", line)
    assert not directory.exists()
