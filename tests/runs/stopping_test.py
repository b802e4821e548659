"""What a run that is asked to stop says it waits for."""

import signal

import pytest
from locations import ROOT

from fedqsn_jax import load
from fedqsn_jax.cli.main import main
from fedqsn_jax.config.schema import Config, with_fields
from fedqsn_jax.reporting.writers import MetricsFile
from fedqsn_jax.runs import stopping
from fedqsn_jax.runs.stopping import RunningCall


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


def test_a_request_says_when_the_run_stops_and_what_stands(clock, capsys):
    config = with_fields(Config(), {"rounds": 23, "rounds_per_call": 10})
    running = RunningCall(config, lambda: "the same command resumes after round 10")

    def said():
        signal.raise_signal(signal.SIGTERM)
        return capsys.readouterr().err

    def told(finished=None):
        if finished is not None:
            running.begins_after(finished)
        with running.stopping_at(signal.SIGTERM):
            return said()

    rest = "the same command resumes after round 10; once more: at once\n"
    sooner = "(with a smaller rounds_per_call than 10 sooner)"
    remains = "the same command resumes after round 10"
    assert told() == f"stopping after what is running ({remains}); once more: at once\n"
    assert running.stopped.is_set()
    assert told(0) == (
        f"stopping after round 10, the end of the first call, which also compiles {sooner}; if "
        f"this process is ended before, {rest}"
    )
    clock[0] += 40
    running.begins_after(10)
    clock[0] += 7
    assert told() == (
        f"stopping after round 20, in about 33 s {sooner}; if this process is ended before, {rest}"
    )
    # A run that goes on where it was is between two multiples.
    assert "stopping after round 23" in told(20)
    assert told(23).startswith("stopping after what is running")


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_stops_where_it_says(tmp_path, monkeypatch, capsys):
    """Asked to while it writes what round 2 told: the next call is begun, and ends at round 4."""
    append = MetricsFile.append

    def asked(self, entries):
        if entries[-1]["round"] == 2:
            signal.raise_signal(signal.SIGTERM)
        append(self, entries)

    monkeypatch.setattr(MetricsFile, "append", asked)
    fields = ["rounds=6", "rounds_per_call=2", "evaluation.every=2", "evaluation.proxy_samples=2"]
    fields += ["checkpoint.every=6", "pretraining.steps=1", "client.steps=1", "cohort.size=2"]
    arguments = [f"--config={ROOT / 'configs' / 'digits.py'}", f"--workdir={tmp_path / 'run'}"]
    assert main([*arguments, *(f"--config.{field}" for field in fields)]) == 0
    output, error = capsys.readouterr()
    assert error.startswith("stopping after round 4")
    assert "if this process is ended before, the same command resumes after round 0" in error
    assert "stopped after round 4; the same command resumes there" in output
    assert load(tmp_path / "run").round == 4
