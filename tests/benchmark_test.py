"""The benchmark's workload is the one it says, and its report is complete."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax import benchmark
from fedqsn_jax.models.emnist_cnn import EmnistCNN


def test_the_population_is_the_peers_one():
    data = benchmark.make_population()
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
    small = benchmark.make_population(clients=3, mean=25)
    monkeypatch.setattr(benchmark, "make_population", lambda: small)
    out = tmp_path / "report.json"
    arguments = ["--workload=dense", "--calls=2", "--rounds_per_call=1", f"--out={out}"]
    assert benchmark.main(arguments) == 0
    report = json.loads(out.read_text())
    times = report["workloads"]["dense"]["algorithms"]
    assert set(times) == {"fedavg", "fedqsn"}
    for one in times.values():
        assert 0 < one["best"] <= one["quartiles"][0] <= one["median"] <= one["quartiles"][1]
    assert report["jax"] == jax.__version__
    assert "over FedAvg" in capsys.readouterr().out
