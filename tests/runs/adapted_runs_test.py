"""Adapters from the outside: the command line, checkpoints, and a model of one's own."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from run_cases import CLIENTS, SMALL, rows

from fedqsn_jax import federate, linen_apply, load
from fedqsn_jax.cli.main import main
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.runs.experiment import prepare


def singular_values(after, before):
    """Of the change of a matrix, largest first, relative to the largest."""
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    values = np.linalg.svd(change, compute_uv=False)
    return values / values[0]


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_trains_adapters_on_what_the_server_trained_before(tmp_path, capsys):
    directory = tmp_path / "run"
    few = ["--config.rounds=2", "--config.evaluation.attackers=(2,)"]
    assert main([*SMALL, *few, f"--workdir={directory}", "--config.lora.rank=2"]) == 0
    shown = capsys.readouterr().out
    assert "4-bit NormalFloat, block 64, visible columns; frozen" in shown
    history = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    # Returned are A, and the visible columns of B, 8 bytes each, behind header and bitmap.
    returned = (history[-1]["bytes/up_per_client"] - (48 + 2 + 4 * 64 * 2)) / 8
    assert 0 < returned < 16
    assert (3 * returned) % 1 == pytest.approx(0, abs=1e-9)

    first, last = load(directory, round=0), load(directory)
    problem = prepare(last.config).problem
    assert jax.tree.structure(first.params) == jax.tree.structure(problem.params)
    for before, after in zip(*map(jax.tree.leaves, (problem.params, first.params)), strict=True):
        assert (np.asarray(before) != np.asarray(after)).any()
    jax.tree.map(np.testing.assert_array_equal, last.params["head"], first.params["head"])
    kernels = [run.params["hidden_0"]["kernel"] for run in (last, first)]
    assert singular_values(*kernels)[2] < 1e-5 < singular_values(*kernels)[1]
    model = make_model(last.config.model, problem.splits.num_classes, dropout=0.0)
    logits = linen_apply(model)(last.params, problem.splits.test, None)
    accuracy = (np.argmax(logits, axis=-1) == problem.splits.test["label"]).mean()
    assert accuracy == pytest.approx(history[-1]["global/accuracy"], abs=1e-6)


def test_a_dry_run_of_fedlpp_says_what_is_public(capsys):
    arguments = ["--config.algorithm=fedlpp", "--config.lora.rank=2", "--dry_run"]
    assert main([*SMALL, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "public, not sent" in shown
    # 64 x 2 and 2 x 16 entries in 4 bits, and a scale of two bytes for every 64 of them.
    down = 48 + 64 + 16 + 2 * 2 + 1 * 2
    assert f"{down:,}" in shown
    assert f"{48 + 4 * (128 + 32):,}" in shown
    # FedAvg sends the model without adapters.
    assert f"{48 + 4 * (64 * 16 + 16 + 16 * 10 + 10):,}" in shown


class _Unnamed(nn.Module):
    """Its head is called ``Dense_0``, for it is made first."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


@pytest.mark.usefixtures("quick_compilation")
def test_a_model_of_ones_own_with_adapters_and_its_head():
    model = _Unnamed()
    start = model.init(jax.random.key(0), rows(1)["image"])["params"]
    result = federate(
        model,
        CLIENTS,
        rows(9),
        params=start,
        p1=0.0,
        lora={"rank": 1, "public_base": True, "quantize": True},
        evaluation={"attackers": (), "proxy_samples": 2},
        client={"steps": 2, "trained": ("lora", "head")},
        rounds=1,
    )
    assert jax.tree.structure(result.params) == jax.tree.structure(start)
    kernels = [params["Dense_1"]["kernel"] for params in (result.params, start)]
    assert singular_values(*kernels)[1] < 1e-5
    np.testing.assert_array_equal(result.params["Dense_1"]["bias"], start["Dense_1"]["bias"])
    assert (result.params["Dense_0"]["bias"] != start["Dense_0"]["bias"]).all()
    travels = {row.path: row.travels for row in result.tensors}
    assert travels == {
        "Dense_0/bias": "float32, whole",
        "Dense_0/kernel": "float32, whole",
        "Dense_1/bias": "public, not sent",
        "Dense_1/kernel": "public, not sent",
        "Dense_1/kernel_lora_a": "4-bit NormalFloat, block 64, whole",
        "Dense_1/kernel_lora_b": "4-bit NormalFloat, block 64, visible columns",
    }
