"""A run measured against FedAvg's, and attackers that train, in its table and its summary."""

import json
import shutil

import pytest
from run_cases import SMALL

from fedqsn_jax.cli.main import main
from fedqsn_jax.config.schema import ConfigError, resolve
from fedqsn_jax.runs.reference import reference_score
from fedqsn_jax.sweeps.grid import make_plan


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "fedavg"
    assert main([f"{SMALL[0]}:fedavg", *SMALL[1:], f"--workdir={path}"]) == 0
    return path


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


def test_the_table_and_the_summary_name_what_was_kept(fedavg, tmp_path, capsys):
    own = tmp_path / "own"
    arguments = [*SMALL, f"--workdir={own}", f"--reference={fedavg}"]
    assert main([*arguments, "--config.evaluation.fine_tuned_attackers=20"]) == 0
    shown = capsys.readouterr().out
    summary, others = summary_of(own), summary_of(fedavg)
    start, end = (summary["views"]["global"][time]["accuracy"] for time in ("start", "end"))
    reached = others["views"]["global"]["end"]["accuracy"]
    # Both start from the same model.
    assert start == others["views"]["global"]["start"]["accuracy"]
    kept = summary["kept_benefit"]
    assert kept["value"] == pytest.approx((end - start) / (reached - start))
    assert f"kept benefit U: {kept['value']:.4f}" in shown
    trained = summary["fine_tuned"]["attackers"]
    assert set(trained) <= {"attacker_1", "attacker_10"}
    assert summary["fine_tuned"]["most_steps"] == 20
    for name, facts in trained.items():
        gap = summary["gaps"]["fine_tuned"][name]
        assert gap == pytest.approx(end - facts["score"])
        assert f"global - {name}, trained" in shown
        assert summary["verdict"]["attackers"][name]["trained"] == facts["score"]
    # A finished run is told again, with or without either.
    assert main([*SMALL, f"--workdir={own}"]) == 0
    assert "kept_benefit" not in summary_of(own)
    assert "fine_tuned" not in summary_of(own)
    assert main([*arguments, "--config.evaluation.fine_tuned_attackers=20"]) == 0
    assert summary_of(own) == summary


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([], "allowed is fedavg"),
        (["--config.data.test_rows=300"], "data.test_rows = 360; allowed is that of the run, 300"),
        (["--config.rounds=6"], "rounds = 4; allowed is that of the run, 6"),
        (["--config.seed=1"], "seed = 0"),
        (["--config.model.hidden=(8,)"], "model.hidden"),
    ],
)
def test_what_is_no_reference_is_refused_in_a_line(change, expected, fedavg, tmp_path, capsys):
    reference = fedavg
    if not change:
        reference = tmp_path / "reference"
        shutil.copytree(fedavg, reference)
        config = json.loads((reference / "config.json").read_text())
        (reference / "config.json").write_text(json.dumps(config | {"algorithm": "fedqsn"}))
    own = tmp_path / "own"
    arguments = [*SMALL, *change, f"--workdir={own}", f"--reference={reference}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--reference={reference}" in error
    assert expected in error
    assert not own.exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: shutil.rmtree(path), "there is no run in it"),
        (lambda path: (path / "summary.json").unlink(), "the run is not finished"),
        (lambda path: (path / "summary.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "summary.json").write_text('{"rounds": 2}'), "round 2 of 4"),
        (lambda path: (path / "summary.json").write_text('{"rounds": 4}'), "has no accuracy"),
        (lambda path: (path / "rows.sha256").write_text("0" * 64), "its rows are not those"),
    ],
)
def test_a_reference_without_a_finished_run(damage, expected, fedavg, tmp_path, capsys):
    reference, own = tmp_path / "reference", tmp_path / "own"
    shutil.copytree(fedavg, reference)
    damage(reference)
    assert main([*SMALL, f"--workdir={own}", f"--reference={reference}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert not own.exists()


def test_a_reference_score_is_that_of_its_summary(fedavg):
    rows = (fedavg / "rows.sha256").read_text().strip()
    expected = summary_of(fedavg)["views"]["global"]["end"]["accuracy"]
    assert reference_score(fedavg, rows, "accuracy") == expected


def test_a_sweep_leaves_trained_attackers_to_its_audits():
    config = resolve({"evaluation": {"fine_tuned_attackers": 5}})
    with pytest.raises(ConfigError, match="with --audit thieves train at every point"):
        make_plan(config, [{"p1": [0.1, 0.2]}])
