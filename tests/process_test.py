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
from orbax.checkpoint import v1 as orbax

ROOT = Path(__file__).parent.parent
COMMAND = [
    sys.executable,
    "-m",
    "fedqsn_jax.main",
    "--config=configs/digits.py",
    "--config.rounds=40",
    "--config.rounds_per_call=2",
    "--config.evaluation.every=2",
    "--config.evaluation.proxy_samples=2",
    "--config.checkpoint.every=4",
    "--config.pretraining.steps=20",
    "--config.model.hidden=(32,)",
]


def start(directory: Path) -> subprocess.Popen:
    # All runs compile the same program; the first one's work serves the others.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*COMMAND, f"--workdir={directory}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(directory: Path) -> str:
    process = start(directory)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def wait_for_checkpoint(directory: Path, first: int, process: subprocess.Popen) -> None:
    """Waits until the run has saved round ``first`` or a later one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        saved = [path.name for path in (directory / "checkpoints").glob("[0-9]*")]
        if any(name.isdigit() and int(name) >= first for name in saved):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError("the run has saved nothing")


def metrics(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def saved_state(directory: Path) -> dict:
    latest = max(int(path.name) for path in (directory / "checkpoints").glob("[0-9]*"))
    return orbax.load_checkpointables(directory / "checkpoints" / str(latest), {"state": None})[
        "state"
    ]


def test_interrupted_runs_end_as_an_uninterrupted_one_does(tmp_path):
    """Invariant 9, with a kill -9 and with a SIGTERM."""
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    output = finish(whole)
    assert "\x1b" not in output

    process = start(killed)
    wait_for_checkpoint(killed, 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert "resumed after round" in finish(killed)

    process = start(stopped)
    wait_for_checkpoint(stopped, 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped after round" in output
    finish(stopped)

    expected = saved_state(whole)
    for directory in (killed, stopped):
        assert metrics(directory) == metrics(whole)
        found = saved_state(directory)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)


CTRL_C_WHILE_IMPORTING = """
import os, runpy, signal, sys
_, module, directory = sys.argv
class Finder:
    def find_spec(name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
sys.argv = ["main", "--config=configs/digits.py", "--workdir=" + directory]
runpy.run_module("fedqsn_jax.main", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["ml_collections", "jax", "optax"])
def test_ctrl_c_while_libraries_are_imported_is_quiet(module, tmp_path):
    """Not a run: it ends before the command line has done anything."""
    directory = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, "-c", CTRL_C_WHILE_IMPORTING, module, directory],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")
    assert not directory.exists()
