"""The one call for a model and arrays of one's own: what it gives, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedqsn_jax import ConfigError, Task, federate
from fedqsn_jax.reporting import progress


class Separate(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) + nn.Dense(3)(x**2)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


def rows(count, width=4):
    random = np.random.default_rng(count)
    x = random.normal(size=(count, width)).astype(np.float32)
    return {"image": x, "label": (x[:, 0] > 0).astype(np.int32)}


CLIENTS = [rows(5), rows(8)]
SHORT = {"rounds": 1, "client": {"steps": 1}, "evaluation": {"proxy_samples": 2}}


def squares() -> Task:
    def errors(outputs, batch, valid):
        return jnp.where(valid, (outputs[:, 0] - batch["label"]) ** 2, 0)

    return Task(
        loss=lambda o, b, v: errors(o, b, v).sum() / jnp.maximum(v.sum(), 1),
        statistics=lambda o, b, v: {"loss": errors(o, b, v).sum(), "count": v.sum()},
        summarize=lambda s: {"loss": s["loss"] / s["count"], "score": -s["loss"] / s["count"]},
        score="score",
    )


@pytest.mark.usefixtures("quick_compilation")
def test_a_task_of_ones_own_and_a_population_of_one(capsys, monkeypatch):
    # A sign of life as soon as the timer looks, which it does twice a second.
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_SIGNS", 0.0)
    masks = {"p1": 0.0, "p2": 0.3, "sampling": "fixed_count"}
    result = federate(_Column(), [rows(6)], rows(9), task=squares(), **masks, **SHORT)
    assert {"global/score", "proxy/score_std", "attacker_1/loss"} <= set(result.history[-1])
    assert "federate: " in capsys.readouterr().out
    travels = {row.path: row.travels for row in result.tensors}
    assert travels["score/kernel"] == "float32, whole"
    assert travels["hidden/kernel"].startswith("4-bit NormalFloat")
    # Of 16 columns, round(0.3 * 16) are hidden: what was expected is exactly what travelled.
    assert {row.path: row.hidden for row in result.tensors}["hidden/kernel"] == 5 / 16
    assert result.costs.hides
    for way, expected in (("down", result.costs.down), ("up", result.costs.up)):
        assert result.history[-1][f"bytes/{way}_per_client"] == expected


class _Column(nn.Module):
    """Outputs ``[rows, 1]``, so that the head's only column is the outputs' last axis."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="hidden")(x))
        return nn.Dense(1, name="score")(x)


def test_a_model_without_a_head_that_can_be_told_is_refused_unless_rules_name_it():
    with pytest.raises(ConfigError, match="no task head was found"):
        federate(Separate(), CLIENTS, rows(9), **SHORT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": {**rows(9), "label": rows(4)["label"]}}, "differ in their number of rows"),
        ({"test": rows(9, width=5)}, r"test: 'image' is float32\[5\] a row"),
        ({"test": rows(0)}, "test has no rows"),
        ({"private": {"image": rows(3)["image"]}}, "private has arrays"),
        ({"p1": 1.0}, "p1 = 1.0: allowed is 0 to below 1"),
        ({"p1": 0.99999999}, "p1 = 0.99999999"),
        ({"cohort": {"size": 3}}, "cohort.size = 3"),
        ({"data": {"clients": 3}}, "data: of no use here"),
        ({"roundz": 3}, "unknown field roundz; did you mean rounds?"),
    ],
)
def test_mistakes_are_told(change, message):
    arguments = {"test": rows(9), **SHORT, **change}
    with pytest.raises(ValueError, match=message):
        federate(Classifier(), CLIENTS, **arguments)
