"""After a failed read nothing else is told; and nothing else is kept quiet."""

import logging
import sys
from types import SimpleNamespace

import pytest

from fedqsn_jax.failed_reads import expect_failures


@pytest.fixture
def passed_on(monkeypatch):
    """What comes through the hook, and restores it."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    return seen


def test_only_reads_that_cannot_tell_a_closed_loop_are_left_out(passed_on, tmp_path):
    expect_failures(tmp_path)
    expect_failures(tmp_path)
    closed = RuntimeError("Event loop is closed")
    sys.unraisablehook(SimpleNamespace(exc_value=closed, object=None))
    assert passed_on == []
    others = [
        SimpleNamespace(exc_value=closed, object=print),
        SimpleNamespace(exc_value=RuntimeError("another"), object=None),
        SimpleNamespace(exc_value=None, object=None),
    ]
    for each in others:
        sys.unraisablehook(each)
    assert passed_on == others


@pytest.mark.usefixtures("passed_on")
def test_only_failures_of_the_directory_are_left_out(caplog, tmp_path):
    expect_failures(tmp_path / "10")
    logger = logging.getLogger("asyncio")

    def told(text, error):
        caplog.clear()
        logger.error(text, exc_info=error)
        return bool(caplog.records)

    ours = ValueError(f'OUT_OF_RANGE: in database at local file "{tmp_path}/10/state/"')
    assert not told("Task exception was never retrieved\nfuture: ...", ours)
    assert not told("Future exception was never retrieved\nfuture: ...", ours)
    assert told("Task exception was never retrieved\nfuture: ...", ValueError(f"{tmp_path}/x"))
    assert told("Executing took 0.2 seconds", None)
    assert told("Unhandled exception", ours)
