"""Runs with clients' privacy: what they tell, keep, and cost where they are extended."""

import json

import pytest
from run_cases import SMALL

from fedqsn_jax.main import main
from fedqsn_jax.simulation import accounting
from fedqsn_jax.simulation.accounting import Account

PRIVATE = (
    "--config.server.weighting=uniform",
    "--config.cohort.sampling=poisson",
    "--config.privacy.clip=0.5",
    "--config.privacy.epsilon=6",
)


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_tells_what_it_gives_away_and_goes_on_with_its_noise(tmp_path, capsys, monkeypatch):
    directory = tmp_path / "run"
    command = [*SMALL, *PRIVATE, f"--workdir={directory}"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "the noise for privacy.epsilon = 6.0 is being computed" in told
    noise = json.loads((directory / "privacy.json").read_text())["noise"]
    # 20 clients, three of them a round on average, in eleven places: 3 + 4.4 sqrt(3 * .85).
    account = Account(noise, 1e-5, population=20, expected=3, places=11, poisson=True)
    summary = json.loads((directory / "summary.json").read_text())["privacy"]
    assert summary["epsilon"] == account.epsilon(4)
    assert 5.9 < summary["epsilon"] <= 6
    assert "clients' privacy: epsilon 6 at delta 1e-05 after 4 rounds" in told

    def searched(*arguments):
        raise AssertionError("the noise was found before")

    monkeypatch.setattr(accounting, "_found", searched)
    assert main([*command, "--config.rounds=6"]) == 0
    told = capsys.readouterr().out
    assert "is being computed" not in told
    entries = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    spent = {entry["round"]: entry["privacy/epsilon"] for entry in entries}
    assert spent == {rounds: account.epsilon(rounds) for rounds in (0, 2, 4, 6)}
    cost = f"clients' privacy: epsilon {spent[6]:.3g} at delta 1e-05 after 6 rounds"
    assert told.count(cost) == 2, "before the rounds, and in the final table"
    (directory / "privacy.json").write_text("{}")
    assert main([*command, "--config.rounds=6"]) == 2
    assert "privacy.json cannot be read" in capsys.readouterr().err
