"""What files say: metrics, JSON and TensorBoard, each replaced in one step."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from reporting_cases import make_history
from tensorboardX.proto import event_pb2

from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.reporting.writers import MetricsFile, TensorBoard, write_json


@pytest.fixture
def history():
    return make_history()


def read_lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_file_reads_back_exactly(tmp_path, history):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.rewrite(history[:1])
    file.append(history[1:3])
    file.append(history[3:])
    assert read_lines(path) == history
    odd = {"round": np.int64(30), "a": np.float32(0.1), "b": jnp.float32(1 / 3), "c": 0.1 + 0.2}
    file.append([odd | {"nan": math.nan, "inf": np.float32(-np.inf), "none": None}])
    last = read_lines(path)[-1]
    assert last["a"] == float(np.float32(0.1))
    assert np.float32(last["b"]) == np.float32(1 / 3)
    assert last["c"] == 0.1 + 0.2
    assert (last["round"], last["nan"], last["inf"], last["none"]) == (30, None, None, None)


def test_rewrite_replaces_in_one_step(tmp_path, history):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).rewrite(history)
    with path.open() as reader:
        MetricsFile(path).rewrite(history[:2])
        assert len(reader.readlines()) == len(history)  # the old file, undamaged
    assert read_lines(path) == history[:2]
    with pytest.raises(TypeError):
        MetricsFile(path).rewrite([{"round": object()}])
    assert read_lines(path) == history[:2]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_interrupted_replacement_leaves_nothing(tmp_path):
    path = tmp_path / "file"

    def write(text, error):
        with replacing(path) as temporary:
            temporary.write_text(text)
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    write("whole", None)
    assert path.read_text() == "whole"


def test_write_json_is_sorted_and_free_of_nan(tmp_path, history):
    path = tmp_path / "summary.json"
    write_json(path, {"b": (1, np.float32(0.5)), "a": {"c": math.nan}, "path": tmp_path})
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert json.loads(path.read_text()) == {"a": {"c": None}, "b": [1, 0.5], "path": str(tmp_path)}
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def read_events(directory):
    """Scalars ``(tag, step, value, time)`` of all event files; a record is framed by checksums."""
    scalars = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            scalars += [
                (value.tag, event.step, value.simple_value, event.wall_time)
                for value in event.summary.value
            ]
    return scalars


def expected_events(history):
    return sorted(
        (tag, each["round"], np.float32(value))
        for each in history
        for tag, value in each.items()
        if tag != "round"
    )


def test_tensorboard_has_every_scalar_once_after_a_resume(tmp_path, history):
    directory = tmp_path / "tensorboard"
    with TensorBoard(directory, pytest.fail) as board:
        board.rewrite(history[:1])
        board.append(history[1:])
        board.append([])
    (directory / "other").write_text("a user's own file")
    assert sorted(event[:3] for event in read_events(directory)) == expected_events(history)

    # The checkpoint was two entries behind when the run stopped; those rounds run again.
    with TensorBoard(directory, pytest.fail) as board:
        board.rewrite(history[:2])
        board.append(history[2:])
    events = read_events(directory)
    assert sorted(event[:3] for event in events) == expected_events(history)
    assert (directory / "other").exists()
    times = {step: wall_time for tag, step, _, wall_time in events if tag == "global/loss"}
    assert times[5] - times[0] == pytest.approx(2.0, abs=1e-3)


def test_tensorboard_reopens_without_losing_anything(tmp_path, history):
    board = TensorBoard(tmp_path, pytest.fail)
    board.close()
    for each in history:
        board.append([each | {"train/loss": None, "proxy/bleu": math.nan, "a": math.inf}])
        board.close()
    assert sorted(event[:3] for event in read_events(tmp_path)) == expected_events(history)
