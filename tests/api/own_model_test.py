"""The one call for a model and arrays of one's own: what it gives, and what it refuses."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from run_cases import CLIENTS, rows

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


class Named(nn.Module):
    """Layers that are called as one likes, and a dropout that nobody tells to act."""

    names: tuple[str, ...]
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, learns=False):
        for name in self.names[:-1]:
            x = nn.relu(nn.Dense(8, name=name)(x))
        x = nn.Dropout(self.rate, name="drop")(x, deterministic=not learns)
        return nn.Dense(3, name=self.names[-1])(x)


def hidden(model, test=None, **settings):
    """The paths of tensors of which columns are hidden; no round is run."""
    test = rows(9) if test is None else test
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "attacker_|the training diverged")
        result = federate(model, CLIENTS, test, **{**SHORT, "rounds": 0, **settings})
    return [row.path for row in result.tensors if row.hidden]


def of(*layers):
    return [f"{layer}/{name}" for layer in layers for name in ("bias", "kernel")]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("names", [("l2", "l[2]"), ("Dense", "dense"), ("dense", "Dense")])
def test_the_head_and_no_layer_that_is_called_nearly_so_is_never_hidden(names):
    assert hidden(Named(names)) == of(names[0])


@pytest.mark.usefixtures("quick_compilation")
def test_layers_that_are_called_as_heads_and_norms_are_hidden_all_the_same():
    names = ("head", "normal", "x_logits", "whatever")
    assert hidden(Named(names)) == of(*names[:-1])
    whole = ("=head/kernel: none",)
    assert hidden(Named(names), site_rules=whole) == of(*names[1:-1])


class Unknown(nn.Module):
    """A layer whose matrix is called as no rule knows."""

    @nn.compact
    def __call__(self, x):
        matrix = self.param("matrix", nn.initializers.normal(), (x.shape[-1], 8))
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(8, name="first")(x @ matrix)))


@pytest.mark.usefixtures("quick_compilation")
def test_what_no_rule_takes_for_a_layer_is_told():
    with pytest.warns(
        UserWarning, match=r"^site_rules: nothing of matrix is hidden .*input column"
    ):
        assert hidden(Unknown()) == of("first")
    rules = ("matrix: input column",)
    assert hidden(Unknown(), site_rules=rules) == [*of("first"), "matrix"]


@pytest.mark.usefixtures("quick_compilation")
def test_a_rule_cannot_hide_the_head():
    assert hidden(Named(("a", "b")), site_rules=("*/kernel: input column",)) == of("a")
    with pytest.warns(UserWarning, match=r"^site_rules: 'b/kernel: input column' has no effect"):
        assert hidden(Named(("a", "b")), site_rules=("b/kernel: input column",)) == of("a")


@pytest.mark.usefixtures("quick_compilation")
def test_haikus_names_are_known():
    params = {
        "mlp/~/linear_0": {"w": jnp.ones((4, 8)), "b": jnp.ones(8)},
        "mlp/~/linear_1": {"w": jnp.ones((8, 3)), "b": jnp.ones(3)},
    }

    def apply_fn(params, batch, key):
        first, last = (params[f"mlp/~/linear_{index}"] for index in (0, 1))
        x = jnp.tanh(batch["image"] @ first["w"] + first["b"][None])
        return x @ last["w"] + last["b"][None]

    assert hidden((apply_fn, params)) == ["mlp/~/linear_0/b", "mlp/~/linear_0/w"]


@pytest.mark.usefixtures("quick_compilation")
def test_where_nothing_is_hidden_no_site_and_no_head_are_needed():
    assert hidden(nn.Dense(3), algorithm="fedavg") == []
    assert hidden(Separate(), algorithm="fedavg") == []


@pytest.mark.usefixtures("quick_compilation")
def test_what_the_first_test_row_holds_does_not_hide_the_head():
    test = rows(9)
    test["image"][0] = 0
    assert hidden(Named(("a", "b")), test) == of("a")
    test["image"][0] = np.nan
    # It is not told as a training that diverged.
    with (
        pytest.warns(UserWarning, match="^test: 'image' has 4 values that are not finite$"),
        pytest.warns(UserWarning, match="^the loss was no number before the first round"),
    ):
        assert hidden(Named(("a", "b")), test) == of("a")


@pytest.mark.usefixtures("quick_compilation")
def test_a_dropout_that_never_acts_is_told():
    with pytest.warns(
        UserWarning, match=r"^model: drop drops nothing in training\. A model is told"
    ):
        hidden(Named(("a", "b"), rate=0.5))


@pytest.mark.usefixtures("quick_compilation")
def test_dropout_acts_under_another_name():
    """With nine tenths dropped a step is another one; both start from the same parameters."""

    class Dropping(nn.Module):
        rate: float

        @nn.compact
        def __call__(self, x, is_training=False):
            x = nn.relu(nn.Dense(16)(x))
            x = nn.Dropout(self.rate, rng_collection="noise")(x, deterministic=not is_training)
            return nn.Dense(3)(x)

    runs = [federate(Dropping(rate), CLIENTS, rows(9), **SHORT).history for rate in (0.0, 0.9)]
    losses = [[entry["global/loss"] for entry in run] for run in runs]
    assert losses[0][0] == losses[1][0]
    assert abs(losses[0][1] - losses[1][1]) > 1e-4


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


def test_rows_on_which_the_scale_is_chosen_are_not_trained_on(monkeypatch):
    """Of seven private rows four are kept, the last ones."""
    seen = []

    def stop(config, apply_fn, task, params, private):
        seen.append(private)
        raise InterruptedError

    monkeypatch.setattr("fedqsn_jax.api.own_model.pretrain", stop)
    one_way = {"broadcast": {"every": 0}, "server": {"scale": 0.0, "validation_rows": 4}}
    with pytest.raises(InterruptedError):
        federate(Classifier(), CLIENTS, rows(9), private=rows(7), **one_way, **SHORT)
    np.testing.assert_array_equal(seen[0]["image"], rows(7)["image"][:3])
