"""Several real processes on this machine, which speak over the loopback interface."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from locations import ROOT

from fedqsn_jax.cli.main import main
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.host import distributed
from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.host.distributed import Settings, read_settings

FLAGS = os.environ.get("XLA_FLAGS", "")
RUN = [
    "--config=configs/digits.py",
    "--config.rounds_per_call=2",
    "--config.evaluation.every=2",
    "--config.evaluation.proxy_samples=2",
    "--config.evaluation.attackers=(2,)",
    "--config.checkpoint.every=2",
    "--config.pretraining.steps=5",
    "--config.client.steps=2",
    "--config.cohort.size=7",
    "--config.model.hidden=(16,)",
]


def start(directory: Path, devices: int, *arguments: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "fedqsn_jax.main", *RUN, f"--workdir={directory}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(directory: Path, *arguments: str, devices=(4, 4)) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    several = (f"--coordinator_address={address}", "--num_processes=2")
    return [
        start(directory, devices[index], *several, f"--process_id={index}", *arguments)
        for index in range(2)
    ]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit codes, standard outputs and standard errors."""
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def metrics(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def wait_until(happened, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.05)


def test_two_processes_are_one_run_that_another_number_of_devices_goes_on_with(tmp_path, capsys):
    """Also: one writer; a SIGTERM that one of them gets stops both after the same round."""
    one, two = tmp_path / "one", tmp_path / "two"
    processes = start_two(two, "--config.rounds=100000")
    wait_until((two / "metrics.jsonl").exists, processes)
    wait_until(lambda: len(metrics(two)) >= 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    leader, follower = ends(processes)
    assert leader[0] == follower[0] == 0, (leader, follower)
    assert "8 devices" in leader[1]
    assert "stopped after round" in leader[1]
    assert follower[1] == ""
    assert len(list((two / "tensorboard").iterdir())) == 1
    ours = metrics(two)
    # Perhaps a round that is not evaluated.
    stopped = max(int(path.name) for path in (two / "checkpoints").glob("[0-9]*"))
    assert ours[-1]["round"] <= stopped

    assert main([*RUN, f"--workdir={one}", "--config.rounds=4"]) == 0
    theirs = metrics(one)
    assert [entry["round"] for entry in theirs] == [0, 2, 4]
    for a, b in zip(ours, theirs, strict=False):
        assert a.keys() == b.keys()
        # The devices' sums are added up in another order.
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)

    # A run may only grow: what it was to be at first is put right before it goes on.
    file = two / "config.json"
    file.write_text(file.read_text().replace("100000", str(stopped)))
    capsys.readouterr()
    assert main([*RUN, f"--workdir={two}", f"--config.rounds={stopped + 2}"]) == 0
    assert f"resumed after round {stopped}" in capsys.readouterr().out
    assert metrics(two)[: len(ours)] == ours
    assert metrics(two)[-1]["round"] == stopped + 2


def test_a_process_that_disappears_ends_the_other(tmp_path):
    directory = tmp_path / "run"
    processes = start_two(directory, "--config.rounds=100000", devices=(1, 1))
    saved = directory / "checkpoints"
    wait_until(lambda: any(path.name.isdigit() for path in saved.glob("[1-9]*")), processes)
    os.kill(processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    (code, _, error), _ = ends(processes)
    assert time.monotonic() - began < 60
    assert code == 1
    assert error == (
        "fedqsn_jax: process 0: process 1 is gone; the last checkpoint stands, "
        "start all processes again to go on from there\n"
    )
    # What is left can be read: a save that was cut off has no number for a name.
    with Checkpoints(saved, keep_latest=2, keep_best=1) as checkpoints:
        parameters, _, finished = checkpoints.read("params")
    assert finished > 0
    assert "head/kernel" in parameters


def test_a_wrong_number_of_devices_is_one_line_of_each(tmp_path):
    directory = tmp_path / "run"
    both = ends(start_two(directory, "--config.rounds=2", devices=(1, 2)))
    for code, output, error in both:
        assert (code, output) == (2, "")
        assert error == (
            "fedqsn_jax: the processes have 1, 2 devices: allowed is the same number in all\n"
        )
    assert not directory.exists()


def test_settings_come_from_the_command_line_and_behind_it_the_environment():
    environment = {"FEDQSN_COORDINATOR_ADDRESS": "host:1", "FEDQSN_NUM_PROCESSES": "4"}
    assert read_settings({}, {}) is None
    assert read_settings({"process_id": "3"}, environment) == Settings("host:1", 4, 3)
    assert read_settings({"process_id": "0", "num_processes": "1"}, environment) is None
    for options, message in (
        ({}, "no --process_id"),
        ({"process_id": "4"}, "--process_id=4: allowed is 0 to 3"),
        ({"process_id": "0", "num_processes": "x"}, "--num_processes=x: allowed is 1 to"),
        ({"process_id": "0", "coordinator_address": "host"}, "allowed is HOST:PORT"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_settings(options, environment)


def test_processes_that_would_run_differently_are_told_so(monkeypatch):
    distributed.require_same("cohort.chunk_size", "34")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for other, wrong in (("34", False), ("30", True)):
        monkeypatch.setattr(distributed, "_exchange", lambda mine, other=other: [mine, other])
        if not wrong:
            distributed.require_same("cohort.chunk_size", "34")
            continue
        with pytest.raises(ConfigError, match=r"^cohort.chunk_size: the processes have 34, 30; "):
            distributed.require_same("cohort.chunk_size", "34")
