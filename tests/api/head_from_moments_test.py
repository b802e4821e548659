"""A head that is solved by sums of public features: exact, additive, independent of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.api import head_from_moments as module
from fedqsn_jax.api.head_from_moments import head_from_moments
from fedqsn_jax.rounds.feature_moments import (
    draw_features,
    feature_values,
    fit_translation,
    moments_bytes,
    moments_of,
    solve_head,
    total,
    translated,
)

RANDOM = np.random.default_rng(0)
HIDDEN = 12
PARAMS = {
    "hidden": {
        "kernel": jnp.asarray(RANDOM.normal(size=(4, HIDDEN)) / 2, jnp.float32),
        "bias": jnp.asarray(RANDOM.normal(size=HIDDEN) / 2, jnp.float32),
    },
    "head": {"kernel": jnp.zeros((HIDDEN, 3)), "bias": jnp.zeros(3)},
}


def hidden(x):
    return jax.nn.relu(x @ PARAMS["hidden"]["kernel"] + PARAMS["hidden"]["bias"][None])


def apply_fn(params, batch, key):
    layer = params["hidden"]
    h = jax.nn.relu(batch["image"] @ layer["kernel"] + layer["bias"][None])
    return h @ params["head"]["kernel"] + params["head"]["bias"][None]


def rows(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return {"image": x, "label": (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0)}


CLIENTS = [rows(40, 1), rows(7, 2), rows(25, 3)]
PRIVATE = rows(30, 4)


def test_sums_of_parties_are_those_of_all_rows_and_ridge_is_the_normal_equations():
    features = draw_features(jax.random.key(0), 4, 6, 1.0)
    parts = []
    for each in CLIENTS:
        valid = np.arange(50) < len(each["label"])
        padded = np.minimum(np.arange(50), len(each["label"]) - 1)
        values = feature_values(features, jnp.asarray(each["image"][padded]))
        parts.append(moments_of(values, jnp.asarray(each["label"][padded]), valid, 3))
    found = total(parts)
    x = np.concatenate([each["image"] for each in CLIENTS]).astype(np.float64)
    hot = np.eye(3)[np.concatenate([each["label"] for each in CLIENTS])]
    plain = np.maximum(x @ np.asarray(features.kernel) + np.asarray(features.bias), 0)
    plain = np.c_[plain, np.ones(len(x))]
    assert found.rows == 72
    np.testing.assert_allclose(found.products, plain.T @ plain, rtol=1e-4)
    np.testing.assert_allclose(found.labels, plain.T @ hot, rtol=1e-4)
    # Ridge regression as least squares with rows of their own for the penalty.
    penalty = 1e-2 * np.trace(plain.T @ plain) / 7
    more = np.concatenate([plain, np.sqrt(penalty) * np.eye(7)])
    expected = np.linalg.lstsq(more, np.concatenate([hot, np.zeros((7, 3))]), rcond=None)[0]
    kernel, bias = solve_head(found, 1e-2)
    np.testing.assert_allclose(np.r_[kernel, bias[None]], expected, atol=1e-4)


def test_a_linear_map_is_found_and_sums_go_through_it():
    public = np.c_[RANDOM.normal(size=(60, 5)), np.ones(60)]
    linear = RANDOM.normal(size=(6, 3))
    translation = fit_translation(public, public @ linear, ridge=1e-9)
    np.testing.assert_allclose(translation, linear, atol=1e-6)
    values, labels = jnp.asarray(public, jnp.float32), jnp.asarray(RANDOM.integers(0, 3, 60))
    sums = moments_of(values, labels, jnp.ones(60, bool), 3)
    own = translated(sums, translation)
    mapped = public @ linear
    np.testing.assert_allclose(own.products, mapped.T @ mapped, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(own.labels, mapped.T @ np.eye(3)[labels], rtol=1e-4, atol=1e-3)


def test_the_new_head_is_nearly_that_of_all_rows():
    """Least squares on the hidden features of everybody's rows, which nobody could compute."""
    solved = head_from_moments(apply_fn, PARAMS, CLIENTS, PRIVATE, features=200, spread=1.5)
    everyone = [*CLIENTS, PRIVATE]
    x = np.concatenate([each["image"] for each in everyone])
    hot = np.eye(3)[np.concatenate([each["label"] for each in everyone])]
    own = np.c_[np.asarray(hidden(x)), np.ones(len(x))]
    best = np.linalg.lstsq(own, hot, rcond=None)[0]
    test = rows(1000, 9)
    answers = np.c_[np.asarray(hidden(test["image"])), np.ones(1000)] @ best
    pooled = (answers.argmax(-1) == test["label"]).mean()
    found = apply_fn(solved.params, test, None)
    assert (np.asarray(found).argmax(-1) == test["label"]).mean() > pooled - 0.05
    alone = head_from_moments(apply_fn, PARAMS, [rows(1, 1)], PRIVATE, features=200, spread=1.5)
    mean_error = {
        name: float(np.square(np.asarray(apply_fn(each.params, test, None)) - answers).mean())
        for name, each in (("together", solved), ("alone", alone))
    }
    assert mean_error["together"] < mean_error["alone"] / 2
    jax.tree.map(np.testing.assert_array_equal, solved.params["hidden"], PARAMS["hidden"])


def test_what_clients_return_is_the_same_for_any_model_server_rows_and_other_clients(monkeypatch):
    returned = []

    def keep(parts):
        returned.append([jax.tree.map(np.asarray, part) for part in parts])
        return total(returned[-1])

    monkeypatch.setattr(module, "total", keep)
    other = jax.tree.map(lambda leaf: 3 * leaf + 1, PARAMS)
    head_from_moments(apply_fn, PARAMS, CLIENTS, PRIVATE, features=8)
    head_from_moments(apply_fn, other, [CLIENTS[0], rows(40, 5)], rows(20, 6), features=8)
    # Each call adds up the clients' sums first, then theirs and the server's.
    first, second = returned[0], returned[2]
    assert (len(first), len(second)) == (3, 2)
    jax.tree.map(np.testing.assert_array_equal, first[0], second[0])


def test_bytes_are_a_seed_down_and_one_half_of_symmetric_sums_up():
    solved = head_from_moments(apply_fn, PARAMS, CLIENTS, PRIVATE, features=8)
    assert solved.bytes_down == 12
    assert solved.bytes_up == moments_bytes(8, 3) == 4 * (9 * 10 // 2 + 9 * 3 + 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"features": 0}, "features = 0"),
        ({"spread": 0.0}, "spread = 0.0"),
        ({"inputs": "picture"}, "'picture' is no array of the rows; allowed are image, label"),
        ({"inputs": "label"}, "'label' is int32; allowed are floating-point numbers"),
        ({"private": {name: array[:0] for name, array in PRIVATE.items()}}, "private has no rows"),
        ({"private": {**PRIVATE, "label": PRIVATE["label"] + 5}}, "private: "),
        ({"clients": [{**CLIENTS[0], "label": CLIENTS[0]["label"] - 1}]}, "client 0: "),
        (
            {"apply_fn": lambda params, batch, key: apply_fn(params, batch, key) ** 2},
            "model: head/kernel is no dense head",
        ),
    ],
)
def test_mistakes_are_a_line(change, told):
    arguments = {"apply_fn": apply_fn, "params": PARAMS, "clients": CLIENTS, "private": PRIVATE}
    with pytest.raises(ValueError, match=told) as caught:
        head_from_moments(**(arguments | {"features": 8} | change))
    assert "\n" not in str(caught.value)
