"""A disk that is full, or takes no more files: one line and exit code 2; the checkpoint stands."""

import errno
import json
import os
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager

import jax
import pytest
from locations import ROOT

from fedqsn_jax import load
from fedqsn_jax.cli.main import main
from fedqsn_jax.config.schema import CheckpointConfig, ConfigError
from fedqsn_jax.host.checkpoints import CheckpointError, Checkpoints
from fedqsn_jax.reporting import plots, writers
from fedqsn_jax.reporting.writers import MetricsFile, TensorBoard
from fedqsn_jax.runs import disk_space

SMALL = [
    f"--config={ROOT / 'configs' / 'digits.py'}",
    *("--config.rounds=4", "--config.rounds_per_call=2", "--config.evaluation.every=2"),
    *("--config.evaluation.proxy_samples=2", "--config.checkpoint.every=2"),
    *("--config.pretraining.steps=5", "--config.client.steps=1", "--config.cohort.size=3"),
    "--config.model.hidden=(16,)",
]

FULL = os.strerror(errno.ENOSPC)


def refuse(*arguments, **named):
    raise OSError(errno.ENOSPC, FULL)


def a_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("fedqsn_jax: ")
    return error


def test_metrics_that_cannot_be_written_end_the_run_in_a_line(tmp_path, capsys, monkeypatch):
    append = MetricsFile.append

    def full_after_two(self, entries):
        if entries and entries[-1]["round"] > 2:
            with writers.told_as_file_error(self._path):
                refuse()
        append(self, entries)

    monkeypatch.setattr(MetricsFile, "append", full_after_two)
    workdir = tmp_path / "run"
    assert main([*SMALL, f"--workdir={workdir}"]) == 2
    line = a_line(capsys)
    assert f"{workdir / 'metrics.jsonl'}: {FULL}" in line
    assert "resumes after round 2" in line
    assert load(workdir).round == 2
    monkeypatch.undo()
    # A picture that cannot be written: the results are there, and the same command goes on.
    monkeypatch.setattr(plots, "accuracy_curves", refuse)
    assert main([*SMALL, f"--workdir={workdir}"]) == 2
    assert f"accuracy.png: {FULL}" in a_line(capsys)
    assert load(workdir).round == 4
    monkeypatch.undo()
    (workdir / "metrics.jsonl").write_text("damaged\n")
    (workdir / "summary.json").write_text("{}")
    assert main([*SMALL, f"--workdir={workdir}"]) == 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == load(workdir).history


def test_tensorboard_is_only_a_display(tmp_path, monkeypatch):
    """A file in its directory's place, or a disk that is full: one warning, and no more."""
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "board"):
        warnings = []
        with TensorBoard(directory, warnings.append) as board:
            if directory.name == "board":
                board.append([{"round": 0, "loss": 1.0}])
                monkeypatch.setattr(board._writer, "write", refuse)
            for number in range(1, 500):
                board.append([{"round": number, "loss": 1.0}])
        (line,) = warnings
        assert line.endswith("the run goes on without TensorBoard")
        assert "\n" not in line


def test_room_is_looked_at_before_the_start(tmp_path, monkeypatch):
    state = {"x": jax.ShapeDtypeStruct((1_000_000,), "float32")}
    settings = CheckpointConfig(keep_latest=2, keep_best=1)
    usage = type("Usage", (), {})()
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage)
    for free, answer in ((8.9e6, "two have to fit"), (9.1e6, "there may be 4"), (17.1e6, None)):
        usage.free = free
        if answer and answer.startswith("two"):
            with pytest.raises(ConfigError, match=rf"/new: 8\.9 MB are free; .*{answer}"):
                disk_space.check_room(tmp_path / "new", state, settings, existing=0)
        else:
            said = disk_space.check_room(tmp_path / "new", state, settings, existing=0)
            assert said is None if answer is None else answer in said
    usage.free = 5.1e6
    # Three lie there already: one more has to fit.
    assert disk_space.check_room(tmp_path / "new", state, settings, existing=3) is None


def test_a_directory_in_the_place_of_a_file_is_a_line(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main([*SMALL, "--config.rounds=2", f"--workdir={workdir}"]) == 0
    for name in ("summary.json", "metrics.jsonl"):
        (workdir / name).unlink()
        (workdir / name).mkdir()
        capsys.readouterr()
        assert main([*SMALL, "--config.rounds=2", f"--workdir={workdir}"]) == 2
        assert f"{workdir / name}: Is a directory" in capsys.readouterr().err
        (workdir / name).rmdir()


def test_strict_promotion_of_dtypes_is_for_other_programs(tmp_path):
    with jax.numpy_dtype_promotion("strict"):
        assert main([*SMALL, "--config.rounds=2", f"--workdir={tmp_path / 'run'}"]) == 0


def test_a_platform_that_does_not_start_is_a_line(tmp_path, capsys, monkeypatch):
    for reason in (
        RuntimeError("Unable to initialize backend 'cuda':\nno device"),
        AssertionError(),
    ):

        def devices(reason=reason):
            raise reason

        monkeypatch.setattr(jax, "devices", devices)
        assert main([*SMALL, f"--workdir={tmp_path / 'run'}"]) == 2
        assert a_line(capsys).startswith("fedqsn_jax: JAX_PLATFORMS=")
    assert not (tmp_path / "run").exists()


@contextmanager
def small_file_system(place, options):
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("what", "options"), [("bytes", "size=8m"), ("inodes", "size=8m,nr_inodes=300")]
)
def test_a_real_small_file_system(what, options, tmp_path, capsys, monkeypatch):
    save = Checkpoints.save

    with small_file_system(tmp_path / "disk", options) as disk:

        def fill_before_the_last(self, round, *rest):
            if round == 4:
                self.wait()
                fill(disk, what)
            save(self, round, *rest)

        monkeypatch.setattr(Checkpoints, "save", fill_before_the_last)
        assert main([*SMALL, f"--workdir={disk / 'run'}"]) == 2
        line = a_line(capsys)
        assert "resumes after round 2" in line
        assert "checkpoint of round 4 could not be written" in line
        assert load(disk / "run").round == 2


def test_a_save_without_inodes_is_told_at_once_wherever_it_ends(tmp_path, capfd):
    """Orbax's threads used to wait five minutes for a directory that could not be made."""
    state = {"kernel": jax.numpy.ones((4, 4)), "bias": jax.numpy.ones(4)}
    with small_file_system(tmp_path / "disk", "size=8m,nr_inodes=300") as disk:
        checkpoints = Checkpoints(disk / "checkpoints", keep_latest=50, keep_best=0)
        checkpoints.save(1, state, [{"round": 1}], 0.0)
        checkpoints.wait()
        fill(disk, "inodes")
        needed = None
        for left in range(40):
            began, told = time.monotonic(), None
            try:
                checkpoints.save(2 + left, state, [{"round": 1}], 0.0)
                checkpoints.wait()
            except CheckpointError as error:
                told = str(error)
            if told is None:
                needed = left
                break
            assert f"of round {2 + left} could not be written" in told
            assert "\n" not in told
            assert time.monotonic() - began < 5
            shutil.rmtree(disk / "checkpoints" / f"{2 + left}.orbax-checkpoint-tmp", True)
            fill(disk, "inodes")
            for number in range(left + 1):
                (disk / f"filler{number}").unlink()
        assert needed
        checkpoints.close()
        # Those of an event loop that was closed; Python would wait for them at its end.
        deadline = time.monotonic() + 5
        while (waiting := event_loops()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not waiting
        # What was written before and after is whole.
        assert checkpoints.rounds() == [1, 2 + needed]
    assert capfd.readouterr() == ("", "")


def event_loops():
    return [thread for thread in threading.enumerate() if thread.name.startswith("asyncio")]


def fill(disk, what):
    """Takes what the file system has left."""
    try:
        for number in range(10_000):
            with (disk / f"filler{number}").open("wb") as file:
                if what == "bytes":
                    file.write(bytes(1 << 16))
    except OSError:
        pass
    if what == "bytes":
        try:
            with (disk / "rest").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))
        except OSError:
            pass
