"""A cohort that is shared out over the devices of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from locations import ROOT


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `mesh_cases` finds in a process with four devices."""
    path = tmp_path_factory.mktemp("mesh") / "found.json"
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
    }
    program = Path(__file__).with_name("mesh_cases.py")
    result = subprocess.run(
        [sys.executable, program, path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


def agree(ours, theirs):
    for layer, tensors in theirs.items():
        expected, actual = np.array(tensors["kernel"]), np.array(ours[layer]["kernel"])
        assert np.linalg.norm(expected) > 0.01
        distance = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert distance <= 1e-5, layer


def test_every_mesh_gives_the_round_of_one_device(found):
    """Invariant 5, with two to four devices, one client after the other and in chunks."""
    expected = found["deltas"].pop("one device")
    assert len(found["deltas"]) == 3
    for deltas in found["deltas"].values():
        agree(deltas, expected)


def test_a_second_call_on_a_mesh_compiles_and_moves_nothing(found):
    """Invariant 8 on four devices, with the state donated."""
    assert found["calls"] == {"round": 2, "compilations": 1, "donated": True, "devices": 4}


def test_streamed_rows_on_a_mesh_give_the_rounds_of_one_device(found):
    """Rows of the next call are sent to all devices; two clients at once on each of four."""
    agree(found["two rounds"]["streamed"], found["two rounds"]["one device"])


def test_the_benchmark_runs_on_all_devices_in_one_program(found):
    first, *later = found["benchmark"]
    assert first > 0
    assert later == [first, first]
