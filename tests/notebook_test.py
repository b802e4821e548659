"""The notebooks run from top to bottom in a short form, and are stored without outputs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

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


def test_the_trade_off_runs(executed, monkeypatch, tmp_path):
    changes = [
        "--sweep.algorithm=['fedavg','fedqsn']",
        "--sweep.p1=0.2",
        "--sweep.p2=[0.0,0.4]",
        "--sweep.bits=4",
        "--sweep.rounds=1",
        "--sweep.evaluation.every=1",
        "--config.rounds_per_call=1",
        "--config.evaluation.proxy_samples=2",
        "--config.model.hidden=(16,)",
        "--config.pretraining.steps=5",
        "--config.client.steps=1",
    ]
    monkeypatch.setenv("FEDQSN_NOTEBOOK_SWEEP", str(tmp_path / "sweep"))
    monkeypatch.setenv("FEDQSN_NOTEBOOK_CHANGES", " ".join([*changes, "--sweep.seed=[0,1]"]))
    shown = executed("trade_off.ipynb")
    assert pictures_in(shown) == 2
    text = text_of(shown)
    # FedAvg, and FedQSN with two values of p2.
    assert "3 settings, 2 seeds each; the attacker here is attacker_10/accuracy" in text
    assert "algorithm=fedqsn p2=0.4" in text
