"""The notebooks run from top to bottom in a short form, and are stored without outputs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from fedqsn_jax.command_line import read_config
from fedqsn_jax.sweeps.grid import make_plan, read_grids
from fedqsn_jax.sweeps.results import SweepDirectory, record_of

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture
def executed(monkeypatch):
    """Runs a notebook in a fresh kernel; returns what its cells showed."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # Most of its time is compilation.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

    def execute(name: str) -> list[Any]:
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(not cell.outputs and cell.execution_count is None for cell in code)
        path = str(NOTEBOOKS.parent)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path}}).execute()
        shown = [output for cell in code for output in cell.outputs]
        assert not any(output.output_type == "error" for output in shown)
        return shown

    return execute


def text_of(shown: list[Any]) -> str:
    return "".join(str(output.get("text", "")) for output in shown)


def pictures_in(shown: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in shown)


def test_the_quickstart_runs(executed, monkeypatch):
    monkeypatch.setenv("FEDQSN_NOTEBOOK_ROUNDS", "2")
    shown = executed("quickstart.ipynb")
    assert pictures_in(shown) == 2
    assert "bytes instead of 340,008" in text_of(shown)
    # Lines of text, and pictures: no HTML for every line, no exit code left standing.
    kinds = {kind for output in shown for kind in output.get("data", {})}
    assert kinds == {"image/png", "text/plain"}
    assert {output.output_type for output in shown if "text" in output} == {"stream"}
    assert not any(output.get("data", {}).get("text/plain") == "0" for output in shown)
    assert "\x1b" not in text_of(shown)


def test_the_trade_off_runs(executed, monkeypatch, tmp_path):
    """On a sweep that is finished, so that the notebook reads it and compiles nothing."""
    changes = [
        "--sweep.algorithm=['fedavg','fedqsn']",
        "--sweep.p1=0.2",
        "--sweep.p2=[0.0,0.4]",
        "--sweep.bits=4",
        "--sweep.seed=[0,1]",
    ]
    grids = read_grids("configs/sweeps/privacy_utility.py", changes)
    plan = make_plan(read_config("configs/digits.py", []), grids)
    files = SweepDirectory(tmp_path / "sweep")
    with files.claim(plan):
        for point in plan.points:
            own = 0.9 - point.config.p2 / 4
            scores = {"global": own, "proxy": 0.8, "attacker_1": 0.7, "attacker_10": 0.7}
            metrics = {f"{view}/accuracy": value for view, value in scores.items()}
            metrics |= {"bytes/down_per_client": 1500.0, "start/accuracy": 0.5}
            files.append([record_of(point, metrics)])
    monkeypatch.setenv("FEDQSN_NOTEBOOK_SWEEP", str(files.path))
    monkeypatch.setenv("FEDQSN_NOTEBOOK_CHANGES", " ".join(changes))
    shown = executed("trade_off.ipynb")
    assert pictures_in(shown) == 2
    text = text_of(shown)
    # FedAvg, and FedQSN with two values of p2.
    assert "3 settings, 2 seeds each; the attacker here is attacker_10/accuracy" in text
    assert "  0.100   0.100      1.5  algorithm=fedqsn p1=0.2 p2=0.4" in text
