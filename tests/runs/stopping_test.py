"""What a run that is asked to stop says it waits for."""

import signal

import pytest
from locations import ROOT

from fedqsn_jax import load
from fedqsn_jax.cli.main import main
from fedqsn_jax.reporting.writers import MetricsFile
from fedqsn_jax.runs import stopping
from fedqsn_jax.runs.stopping import RunningRounds
from fedqsn_jax.simulation import running


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


def test_a_request_says_when_the_run_stops_and_what_stands(clock, capsys):
    remains = "the same command resumes after round 10"
    rounds = RunningRounds(lambda: remains)
    assert not rounds.is_asked()

    def told():
        with rounds.stopping_at(signal.SIGTERM):
            signal.raise_signal(signal.SIGTERM)
        return capsys.readouterr().err

    ended = f"if this process is ended before, {remains}; once more: at once\n"
    assert told() == f"stopping after what is running ({remains}); once more: at once\n"
    assert rounds.is_asked()
    rounds.begins(10, 11)
    assert told() == f"stopping after round 11, the first one, which also compiles; {ended}"
    clock[0] += 4
    rounds.begins(11, 21)
    clock[0] += 7
    assert told() == f"stopping after round 21, in about 33 s; {ended}"


def test_while_the_first_round_compiles_nothing_is_waited_for(capsys):
    came = []
    before = signal.signal(signal.SIGTERM, lambda *told: came.append("usual"))
    try:
        rounds = RunningRounds(str)
        with rounds.stopping_at(signal.SIGTERM):
            rounds.begins(0, 1)
            signal.raise_signal(signal.SIGTERM)
            assert came == ["usual"]
            assert not rounds.is_asked()
            rounds.begins(1, 2)
            signal.raise_signal(signal.SIGTERM)
            assert rounds.is_asked()
            signal.raise_signal(signal.SIGTERM)
        assert came == ["usual", "usual"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.startswith("stopping after round 2")


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_stops_where_it_says(tmp_path, monkeypatch, capsys):
    """Asked to while it writes what round 2 told: the next round is begun, and ends in a call."""
    append = MetricsFile.append

    def asked(self, entries):
        if entries and entries[-1]["round"] == 2:
            signal.raise_signal(signal.SIGTERM)
        append(self, entries)

    monkeypatch.setattr(MetricsFile, "append", asked)
    monkeypatch.setattr(running, "_PIECE_SECONDS", 1e-9)
    fields = ["rounds=8", "rounds_per_call=2", "evaluation.every=2", "evaluation.proxy_samples=2"]
    fields += ["checkpoint.every=6", "pretraining.steps=1", "client.steps=1", "cohort.size=2"]
    arguments = [f"--config={ROOT / 'configs' / 'digits.py'}", f"--workdir={tmp_path / 'run'}"]
    assert main([*arguments, *(f"--config.{field}" for field in fields)]) == 0
    output, error = capsys.readouterr()
    assert error.startswith("stopping after the next rounds")
    assert "if this process is ended before, the same command resumes after round 0" in error
    assert "stopped after round 3; the same command resumes there" in output
    assert load(tmp_path / "run").round == 3
