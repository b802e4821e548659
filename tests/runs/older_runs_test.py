"""Working directories of version 6d8e85d: they resume, load and export with the same results.

``tests/goldens/runs`` has the directories, without pictures and event files, and what that version
made of them: parameters by name, metrics, the exported tensors. The half-done run's process ended
after the save of round 4.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from locations import GOLDENS, ROOT
from safetensors.numpy import load_file

from fedqsn_jax import load
from fedqsn_jax.cli import export
from fedqsn_jax.cli.main import main
from fedqsn_jax.host.history import CHUNK_ENTRIES

RUNS = GOLDENS / "runs"

DIGITS = [
    f"--config={ROOT / 'configs' / 'digits.py'}",
    *("--config.model.hidden=(8,)", "--config.data.clients=5", "--config.cohort.size=3"),
    *("--config.rounds=6", "--config.rounds_per_call=2", "--config.client.steps=3"),
    *("--config.checkpoint.every=2", "--config.checkpoint.keep_latest=1"),
    *("--config.checkpoint.keep_best=0", "--config.pretraining.steps=40"),
    *("--config.evaluation.proxy_samples=2", "--config.evaluation.attackers=(1,3)"),
    "--config.server.momentum=0.5",
]

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def unpack(name: str, place: Path) -> Path:
    with tarfile.open(RUNS / f"{name}.tar.gz") as archive:
        archive.extractall(place, filter="data")
    return place / name


def assert_params(workdir: Path, expected: str) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(load(workdir).params)
    found = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    with np.load(RUNS / expected) as arrays:
        assert set(found) == set(arrays.files)
        for name in arrays.files:
            np.testing.assert_allclose(found[name], arrays[name], **TOLERANCE, err_msg=name)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_metrics(found: list[dict], expected: list[dict]) -> None:
    """Equal but for times."""
    assert [each["round"] for each in found] == [each["round"] for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() >= theirs.keys()
        for name in theirs.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


def test_a_finished_run_loads_and_is_told_as_finished(tmp_path, capsys):
    directory = unpack("digits_finished", tmp_path)
    assert_params(directory, "digits_finished.npz")
    metrics = read_lines(directory / "metrics.jsonl")
    assert load(directory).history == metrics
    assert main([*DIGITS, f"--workdir={directory}"]) == 0
    assert "finished at round 6" in capsys.readouterr().out
    assert_params(directory, "digits_finished.npz")
    assert read_lines(directory / "metrics.jsonl") == metrics


def test_a_half_done_run_resumes_with_the_same_results(tmp_path, capsys):
    directory = unpack("digits_half", tmp_path)
    before = load(directory)
    assert before.round == 4
    assert main([*DIGITS, f"--workdir={directory}"]) == 0
    assert "resumed after round 4" in capsys.readouterr().out
    assert_params(directory, "digits_resumed.npz")
    after = load(directory)
    assert after.round == 6
    # What was saved stays as it was, to the last bit.
    assert after.history[: len(before.history)] == before.history
    expected = read_lines(RUNS / "digits_resumed.jsonl")
    assert_metrics(after.history, expected)
    assert read_lines(directory / "metrics.jsonl") == after.history
    assert len(after.history) < CHUNK_ENTRIES
    assert not (directory / "checkpoints" / "history").exists()


def test_a_run_of_a_language_model_loads_and_exports(tmp_path):
    """Its configuration names places that are no more; the run keeps what it needs of them."""
    directory = unpack("language_finished", tmp_path)
    assert_params(directory, "language_finished.npz")
    out = tmp_path / "exported"
    assert export.main([f"--workdir={directory}", f"--out={out}"]) == 0
    found = load_file(out / "model.safetensors")
    expected = load_file(RUNS / "language_exported.safetensors")
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, **TOLERANCE, err_msg=name)


def test_a_run_of_a_language_model_is_extended(tmp_path):
    model = unpack("tiny_bert", tmp_path)
    directory = unpack("language_finished", tmp_path)
    file = directory / "config.json"
    place = json.loads(file.read_text())["model"]["pretrained"]
    file.write_text(file.read_text().replace(place, str(model)))
    fields = json.loads(file.read_text())
    flags = [DIGITS[0], *(f"--config.{name}={value}" for name, value in flatten(fields))]
    rounds = fields["rounds"]
    assert main([*flags, f"--config.rounds={rounds + 1}", f"--workdir={directory}"]) == 0
    trained = load(directory)
    assert trained.round == rounds + 1
    assert [each["round"] for each in trained.history][-1] == rounds + 1


def flatten(fields: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Fields as the command line has them."""
    flat = []
    for name, value in fields.items():
        if isinstance(value, dict):
            flat += flatten(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, repr(tuple(value)) if isinstance(value, list) else value))
    return flat
