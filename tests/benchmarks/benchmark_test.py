"""The benchmark's workload is the one it says, and its report is complete."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.benchmarks import measuring, workloads
from fedqsn_jax.cli import benchmark
from fedqsn_jax.models.image.emnist_cnn import EmnistCNN


def test_the_population_is_the_peers_one():
    data = workloads.make_population()
    rows = np.diff(np.asarray(data.offsets))
    assert len(rows) == 100
    assert rows.sum() == 10258
    assert rows.min() >= 20
    assert rows.max() <= 400
    assert data.examples["image"].shape == (10258, 28, 28, 1)


def test_the_network_has_its_published_size():
    shapes = jax.eval_shape(EmnistCNN(62).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # 3x3x1x32 + 32, 3x3x32x64 + 64, 12x12x64x128 + 128, 128x62 + 62.
    assert count == 320 + 18496 + 1179776 + 7998


@pytest.mark.usefixtures("quick_compilation")
def test_a_report(tmp_path, monkeypatch, capsys):
    small = workloads.make_population(clients=3, mean=25)
    monkeypatch.setattr(workloads, "make_population", lambda: small)
    out = tmp_path / "report.json"
    arguments = ["--workload=dense", "--calls=2", "--rounds_per_call=1", f"--out={out}"]
    # Strict promotion of dtypes is for users' own programs.
    with jax.numpy_dtype_promotion("strict"):
        assert benchmark.main(arguments) == 0
    report = json.loads(out.read_text())
    times = report["workloads"]["dense"]["algorithms"]
    assert set(times) == {"fedavg", "fedqsn"}
    for one in times.values():
        assert 0 < one["best"] <= one["quartiles"][0] <= one["median"] <= one["quartiles"][1]
    assert report["jax"] == jax.__version__
    assert set(report["workloads"]["dense"]["parts"]) == {"quantize", "mask", "aggregate"}
    shown = capsys.readouterr().out
    assert "over FedAvg" in shown
    assert "parts" in shown
    assert set(map(ord, shown)) <= {10, *range(32, 127)}
    rows = [line.split() for line in shown.splitlines()]
    assert [len(row) for row in rows if row[:2] == ["dense,", "fedqsn"]] == [6]


def test_what_cannot_be_measured_or_written_is_a_line_before_it_is_measured(
    tmp_path, monkeypatch, capsys
):
    def unused(*arguments):
        raise AssertionError("it was measured")

    monkeypatch.setattr(workloads, "make_population", unused)
    assert benchmark.main([f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"fedqsn_jax: {tmp_path}: Is a directory\n"
    for wrong in ("--calls=0", "--rounds_per_call=x", "--clients=10,0", "--population=-1"):
        assert benchmark.main([wrong]) == 2
        assert "allowed are whole numbers of 1 or more" in capsys.readouterr().err

    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda':\nno device")

    monkeypatch.setattr(jax, "devices", devices)
    assert benchmark.main([f"--out={tmp_path / 'new' / 'report.json'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedqsn_jax: JAX_PLATFORMS=")
    assert error.count("\n") == 1


def test_results_that_cannot_be_written_are_shown(tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.json"

    def measured(*arguments):
        out.unlink()
        out.mkdir()
        times = {"median": 1.0, "quartiles": (1.0, 1.0), "best": 1.0}
        return times | {"clients": "one at a time", "rounds": 2, "in_calls": 1.0, "programs": 1}

    monkeypatch.setattr(measuring, "measure_population", measured)
    assert benchmark.main(["--population=8", f"--out={out}"]) == 2
    output, error = capsys.readouterr()
    assert "one at a time" in output
    assert error == f"fedqsn_jax: {out}: Is a directory\n"


def test_reports_of_large_rounds(tmp_path, monkeypatch, capsys):
    """Examples are made where they are used; one program runs all the rounds."""
    out = tmp_path / "report.json"
    arguments = ["--clients=2", "--population=8", "--rounds=2", "--rounds_per_call=1"]
    arguments += ["--calls=1", f"--out={out}", f"--profile={tmp_path / 'traces'}"]
    named = []

    @contextlib.contextmanager
    def traced(directory):
        named.append(directory.name)
        # As with two GPUs, busy for so long in two calls of one round each.
        yield [0.75, 0.25]

    monkeypatch.setattr(measuring, "traced", traced)
    assert benchmark.main(arguments) == 0
    report = json.loads(out.read_text())
    assert list(report["cohorts"]) == ["2"]
    assert report["population"]["programs"] == 1
    assert report["population"]["rounds"] == 2
    for facts in (report["cohorts"]["2"], report["population"]):
        assert facts["device_busy"] == 0.25
        assert facts["device_share"] == pytest.approx(0.25 / facts["median"])
    assert named == ["clients-2", "population"]
    shown = capsys.readouterr().out
    assert "one client at a time" in shown
    assert "device busy" in shown


def test_endless_clients_are_like_the_others():
    data = workloads.make_endless_population(10**6)
    rows = np.asarray(data.rows(jnp.arange(0, 10**6, 199, dtype=jnp.int32)))
    assert rows.min() >= 20
    assert rows.max() <= 400
    # Of a lognormal distribution with mean 100 and sigma 0.5; 5,026 clients.
    assert abs(rows.mean() - 100) < 3
    assert abs(np.median(rows) - 100 * np.exp(-0.125)) < 3
    batch = data.gather(jnp.int32(999_999), jnp.arange(400, dtype=jnp.int32))
    image, labels = np.asarray(batch["image"]), np.asarray(batch["label"])
    assert image.shape == (400, 28, 28, 1)
    assert set(labels.tolist()) <= set(range(62))
    assert len(set(labels.tolist())) > 50
    assert len(np.unique(image.reshape(400, -1), axis=0)) == 400
    # Noise has variance 1/3, prototypes 1/12: images of one label have something in common.
    same = [image[labels == label].mean(axis=0) for label in range(62) if (labels == label).any()]
    np.testing.assert_allclose(np.var(image), 1 / 3 + 1 / 12, rtol=0.05)
    assert np.mean([np.var(one) for one in same]) > 1 / 12
