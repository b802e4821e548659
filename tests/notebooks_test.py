"""The notebooks run from top to bottom in a short form, and are stored without outputs."""

import io
from typing import Any

import nbformat
import pytest
from locations import ROOT
from nbclient import NotebookClient
from rich.console import Console

from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.sweeps.display import SweepDisplay
from fedqsn_jax.sweeps.grid import make_plan, read_grids
from fedqsn_jax.sweeps.results import SweepDirectory, record_of
from fedqsn_jax.sweeps.run import run

NOTEBOOKS = ROOT / "notebooks"


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


def test_the_audit_notebook_runs(executed, monkeypatch):
    changes = [
        "--config.model.hidden=(8,)",
        "--config.pretraining.steps=2",
        "--config.client.steps=1",
        "--config.evaluation.attackers=(1,)",
    ]
    monkeypatch.setenv("FEDQSN_NOTEBOOK_ROUNDS", "2")
    monkeypatch.setenv("FEDQSN_NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("FEDQSN_NOTEBOOK_CHANGES", " ".join(changes))
    shown = executed("audit.ipynb")
    assert pictures_in(shown) == 1
    text = text_of(shown)
    assert "FedQSN as published: U " in text
    assert "\nsticky and one-way: U " in text
    assert "  1 colluding: P " in text
    assert "'largest_change': 0.0, 'learned': False" in text


def finished_sweep(path, flags, grids, metrics_of):
    """Writes what a sweep leaves that has run to its end; ``metrics_of`` a configuration."""
    plan = make_plan(read_config(*flags), grids)
    files, display = SweepDirectory(path), SweepDisplay(Console(file=io.StringIO()))
    with files.claim(plan):
        records = [record_of(point, metrics_of(point.config)) for point in plan.points]
        files.append(records)
    run(plan, path, display)
    return files


def test_the_trade_off_runs_a_sweep_and_reads_it(executed, monkeypatch, tmp_path):
    """Where there is none yet: in a short form here, without FedAvg, with one seed."""
    changes = [
        "--sweep.algorithm=fedqsn",
        "--sweep.p1=[0.1,0.4]",
        "--sweep.p2=0.4",
        "--sweep.bits=4",
        "--sweep.seed=0",
        "--sweep.rounds=1",
        "--sweep.evaluation.every=1",
        "--config.evaluation.attackers=()",
        "--config.model.hidden=(8,)",
        "--config.pretraining.steps=2",
        "--config.client.steps=1",
    ]
    monkeypatch.setenv("FEDQSN_NOTEBOOK_SWEEP", str(tmp_path / "sweep"))
    monkeypatch.setenv("FEDQSN_NOTEBOOK_CHANGES", " ".join(changes))
    shown = executed("trade_off.ipynb")
    assert pictures_in(shown) == 1
    text = text_of(shown)
    assert "digits: 2 settings, 1 seed each\nvaried: p1\nmethods: fedqsn\n" in text
    assert "the rival here: proxy" in text
    assert "no colluders were evaluated" in text
    assert "paid: against the best of the sweep" in text
    assert "p1 from 0.1 to 0.4: the owner " in text
    assert "With one seed there is no telling" in text


def test_the_trade_off_reads_the_digits_sweep(executed, monkeypatch, tmp_path):
    """Nothing is run, though the sweep was about other values than the command's."""
    grids = read_grids(
        "configs/sweeps/privacy_utility.py",
        [
            "--sweep.algorithm=['fedavg','fedqsn']",
            "--sweep.p1=0.2",
            "--sweep.p2=[0.0,0.4]",
            "--sweep.bits=4",
            "--sweep.seed=[0,1]",
        ],
    )

    def metrics_of(config):
        scores = {"global": 0.9 - config.p2 / 4, "proxy": 0.8, "attacker_1": 0.85}
        scores["attacker_10"] = 0.82
        metrics = {f"{view}/accuracy": value for view, value in scores.items()}
        return metrics | {"bytes/down_per_client": 1500.0, "start/accuracy": 0.5}

    files = finished_sweep(tmp_path / "sweep", ("configs/digits.py", []), grids, metrics_of)
    before = files.records.read_bytes()
    monkeypatch.setenv("FEDQSN_NOTEBOOK_SWEEP", str(files.path))
    shown = executed("trade_off.ipynb")
    assert files.records.read_bytes() == before
    assert pictures_in(shown) == 2
    text = text_of(shown)
    # FedAvg, and FedQSN with two values of p2.
    assert "digits: 3 settings, 2 seeds each" in text
    assert "methods: fedavg, fedqsn\n" in text
    assert "the rival here: attacker_10\n" in text
    assert "paid: against FedAvg, 0.900\n" in text
    assert " -0.020   0.100      1.5  algorithm=fedqsn p1=0.2 p2=0.4\n" in text
    assert "The rival (attacker_10) ends ahead of the owner in 1 of 3 settings.\n" in text
    assert "Settings that buy more than they cost, by more than what seeds do: 2.\n" in text
    assert "p2 from 0.0 to 0.4: the owner loses 0.100, the rival hardly changes (+0.000);" in text


def test_the_trade_off_reads_a_language_sweep(executed, monkeypatch, tmp_path):
    """One method, another score, fields that are words or not used, a training that diverged."""
    flags = "configs/glue.py:mrpc,elsewhere", ["--config.data.task=mrpc"]
    common = {"seed": [0, 1], "rounds": [2], "p2": [0.1], "evaluation.every": [2]}
    grids = [
        {"sites": ["all", "residual"], "p1": [0.0, 0.3], **common},
        {"sites": ["all"], "p1": [0.3], "lora.rank": [4], "lora.alpha": [2.0], **common},
    ]

    def metrics_of(config):
        own = 0.9 - 0.1 * config.p1 + 0.01 * config.seed
        if config.lora.rank:
            own = None
        rival = own and own - config.p1 + (0.05 if config.sites == "residual" else 0.0)
        metrics = {
            "global/f1": own,
            "proxy/f1": 0.6,
            "attacker_5/f1": rival,
            "global/accuracy": 0.1,
        }
        return metrics | {"bytes/down_per_client": 1e6, "start/f1": 0.7, "own/attacker_9/f1": 0.1}

    files = finished_sweep(tmp_path / "sweep", flags, grids, metrics_of)
    monkeypatch.setenv("FEDQSN_NOTEBOOK_SWEEP", str(files.path))
    shown = executed("trade_off.ipynb")
    assert pictures_in(shown) == 2
    text = text_of(shown)
    assert "mrpc: 5 settings, 2 seeds each\nvaried: p1, sites, lora.rank, lora.alpha\n" in text
    assert "score: f1, before the first round 0.700\nthe rival here: attacker_5\n" in text
    assert "paid: against the best of the sweep, 0.905\n" in text
    assert "  0.300   0.030   1000.0  p1=0.3 sites=all lora.rank=0\n" in text
    assert "diverged and left out: 1 setting\n" in text
    assert "sites from all to residual: the owner hardly changes" in text
