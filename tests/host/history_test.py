"""The metrics' history: chunks are written once, and nothing else grows with the run."""

import json

import jax.numpy as jnp
import pytest
from checkpoint_cases import assert_one_line, weights

from fedqsn_jax.host.checkpoints import CheckpointError, Checkpoints
from fedqsn_jax.host.history import CHUNK_ENTRIES, ChunkedHistory, HistoryError


def entries(stop, start=0):
    return [{"round": each, "loss": 1 / (each + 1), "note": None} for each in range(start, stop)]


@pytest.mark.parametrize("length", [0, 1, CHUNK_ENTRIES - 1, CHUNK_ENTRIES, 3 * CHUNK_ENTRIES + 5])
def test_a_history_reads_back(tmp_path, length):
    stored = ChunkedHistory(tmp_path).store(entries(length))
    assert len(stored["entries"]) == length % CHUNK_ENTRIES
    assert len(list(tmp_path.iterdir())) == length // CHUNK_ENTRIES
    stored = json.loads(json.dumps(stored))
    assert ChunkedHistory(tmp_path).load(stored) == entries(length)


def test_what_is_stored_is_not_written_again(tmp_path):
    chunks = ChunkedHistory(tmp_path)
    earlier = chunks.store(entries(CHUNK_ENTRIES + 1))
    (first,) = tmp_path.iterdir()
    written = first.stat()
    later = chunks.store(entries(2 * CHUNK_ENTRIES))
    assert later["entries"] == []
    resumed = ChunkedHistory(tmp_path)
    assert resumed.load(later) == entries(2 * CHUNK_ENTRIES)
    resumed.store(entries(3 * CHUNK_ENTRIES))
    # A file that is replaced is another file.
    assert first.stat().st_ino == written.st_ino
    assert first.stat().st_mtime_ns == written.st_mtime_ns
    # An earlier checkpoint's history is a prefix, and stays what it was.
    assert ChunkedHistory(tmp_path).load(earlier) == entries(CHUNK_ENTRIES + 1)


def test_another_history_takes_the_place_of_the_first(tmp_path):
    """A run that goes on from an earlier checkpoint does its later rounds again."""
    chunks = ChunkedHistory(tmp_path)
    chunks.store(entries(2 * CHUNK_ENTRIES))
    other = entries(CHUNK_ENTRIES) + entries(CHUNK_ENTRIES + 7)
    assert ChunkedHistory(tmp_path).load(chunks.store(other)) == other


@pytest.mark.parametrize("damage", ["changed", "missing", "of another run"])
def test_a_damaged_chunk_is_named(tmp_path, damage):
    state = weights(1.0)
    history = entries(2 * CHUNK_ENTRIES + 1)
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(7, state, history, score=0)
        assert checkpoints.restore(state)[1] == history
        file = tmp_path / "history" / "000000.json"
        text = file.read_text()
        if damage == "missing":
            file.unlink()
        elif damage == "changed":
            file.write_text(text.replace("0.25", "0.75", 1))
        else:
            file.write_text(text.replace('"note": null', '"note": true'))
        for use in (lambda: checkpoints.restore(state), lambda: checkpoints.read("weights")):
            with pytest.raises(CheckpointError) as error:
                use()
            assert assert_one_line(error).startswith(f"{file}: ")


def test_a_save_is_as_large_at_any_round(tmp_path):
    """What version 6d8e85d wrote of 40 chunks' entries was 40 times what it wrote of one's."""
    history = entries(40 * CHUNK_ENTRIES)
    sizes = {}
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        for number in (1, 40):
            part = history[: number * CHUNK_ENTRIES + 3 - 128]
            checkpoints.save(number, {"x": jnp.ones(3)}, part, score=0)
            checkpoints.wait()
            step = tmp_path / str(number) / "history"
            sizes[number] = sum(each.stat().st_size for each in step.iterdir())
    assert sizes[40] < 1.2 * sizes[1] + 200


def test_the_error_is_a_line(tmp_path):
    with pytest.raises(HistoryError, match=r"^[^\n]*000000.json: No such file or directory$"):
        ChunkedHistory(tmp_path).load({"chunks": 1, "digest": "", "entries": []})
