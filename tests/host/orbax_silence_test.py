"""After a failed read nothing else is told; and nothing else is kept quiet."""

import asyncio
import gc
import logging
import sys
from types import SimpleNamespace

import pytest

from fedqsn_jax.host import orbax_silence
from fedqsn_jax.host.checkpoints import CheckpointError, Checkpoints
from fedqsn_jax.host.orbax_silence import failures_told_once

CLOSED = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), object=None)


@pytest.fixture
def passed_on(monkeypatch):
    """What comes through the hook; afterwards no read has failed."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    monkeypatch.setattr(orbax_silence, "_expected", ())
    yield seen
    logging.getLogger("asyncio").removeFilter(orbax_silence._failures)


def fail_to_read(directory):
    with pytest.raises(ValueError, match="damaged"), failures_told_once(directory):
        raise ValueError("damaged")


def test_only_reads_that_cannot_tell_a_closed_loop_are_left_out(passed_on, tmp_path):
    fail_to_read(tmp_path)
    fail_to_read(tmp_path)
    sys.unraisablehook(CLOSED)
    assert passed_on == []
    others = [
        SimpleNamespace(exc_value=CLOSED.exc_value, object=print),
        SimpleNamespace(exc_value=RuntimeError("another"), object=None),
        SimpleNamespace(exc_value=None, object=None),
    ]
    for each in others:
        sys.unraisablehook(each)
    assert passed_on == others


def test_after_reads_without_a_failure_all_is_told(passed_on, tmp_path):
    before, filters = sys.unraisablehook, logging.getLogger("asyncio").filters[:]
    with failures_told_once(tmp_path):
        with failures_told_once(tmp_path):
            pass
        # A thread may be later than the failure, but also earlier than whoever answers it.
        sys.unraisablehook(CLOSED)
        assert passed_on == []
    assert (sys.unraisablehook, logging.getLogger("asyncio").filters) == (before, filters)
    # Where another library's hook passes on to ours, which cannot be taken out.
    with failures_told_once(tmp_path):
        ours = sys.unraisablehook
        sys.unraisablehook = lambda unraisable: ours(unraisable)
    sys.unraisablehook(CLOSED)
    assert passed_on == [CLOSED]


@pytest.mark.usefixtures("passed_on")
def test_only_failures_of_the_directory_are_left_out(caplog, tmp_path):
    fail_to_read(tmp_path / "1")
    logger = logging.getLogger("asyncio")

    def told(text, error):
        caplog.clear()
        logger.error(text, exc_info=error)
        return bool(caplog.records)

    ours = ValueError(f'OUT_OF_RANGE: in database at local file "{tmp_path}/1/state/"')
    others = ValueError(f'OUT_OF_RANGE: in database at local file "{tmp_path}/10/state/"')
    assert not told("Task exception was never retrieved\nfuture: ...", ours)
    assert not told("Future exception was never retrieved\nfuture: ...", ours)
    assert told("Task exception was never retrieved\nfuture: ...", others)
    assert told("Executing took 0.2 seconds", None)
    assert told("Unhandled exception", ours)


def test_a_checkpoint_with_several_tensors_that_cannot_be_read_is_one_error(
    passed_on, tmp_path, caplog, monkeypatch
):
    """Orbax's reads in their worst order: all fail at once, and a thread is later than the loop."""

    def read(path, items):
        async def fail():
            raise ValueError(f"damaged: {path}/state/")

        loop = asyncio.new_event_loop()
        first, _ = [loop.create_task(fail()) for _ in range(2)]
        try:
            loop.run_until_complete(first)
        finally:
            loop.close()
            sys.unraisablehook(CLOSED)

    monkeypatch.setattr("fedqsn_jax.host.checkpoints.ocp.load_checkpointables", read)
    (tmp_path / "5" / "state").mkdir(parents=True)
    (tmp_path / "5" / "_CHECKPOINT_METADATA").write_text("{}")
    checkpoints = Checkpoints(tmp_path, keep_latest=1, keep_best=0)
    with checkpoints, pytest.raises(CheckpointError, match="damaged"):
        checkpoints.read("params")
    gc.collect()
    assert (passed_on, caplog.records) == ([], [])
