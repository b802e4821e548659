"""Parameters in any tree: what of them is trained, how it is called, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax import federate
from fedqsn_jax.api.own_params import read_params
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.protocol.lora import find_adapters

ONES = np.ones((2, 3), np.float32)


def test_what_is_no_floating_array_is_a_constant():
    key = jax.random.key(3)
    tree = {
        "w": ONES,
        "steps": np.int32(3),
        "on": True,
        "mask": np.ones(2, bool),
        "key": key,
        "n": 7,
        "scale": 2.5,
        "wide": ONES.astype(">f8"),
    }
    form, params = read_params(tree)
    assert sorted(params) == ["scale", "w", "wide"]
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    again = form.join(jax.tree.map(lambda leaf: 2 * leaf, params))
    np.testing.assert_array_equal(again["w"], 2 * ONES)
    np.testing.assert_array_equal(again["wide"], 2 * ONES)
    assert (again["scale"], again["steps"], again["on"], again["n"]) == (5.0, 3, True, 7)
    assert again["key"] is key
    np.testing.assert_array_equal(again["mask"], [True, True])


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        (ONES, ["params"]),
        ({0: {"kernel": ONES}, 10: {"kernel": ONES}}, ["0/kernel", "10/kernel"]),
        ([(ONES, ONES), (ONES,)], ["0/0", "0/1", "1/0"]),
        ({"mlp/~/linear_0": {"w": ONES}}, ["mlp/~/linear_0/w"]),
    ],
)
def test_trees_of_any_form_have_names_and_come_back(tree, paths):
    form, params = read_params(tree)
    assert list(leaves_by_path(params)) == paths
    again = form.join(params)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_layers_with_numbers_for_names_take_adapters():
    _, params = read_params({0: {"kernel": ONES}, 1: {"kernel": ONES.T}})
    lora = find_adapters(params, ("=1/kernel: none",), (), 2, 2.0)
    assert set(lora.add(jax.random.key(0), params)["0"]) == {
        "kernel",
        "kernel_lora_a",
        "kernel_lora_b",
    }


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": ONES.astype(np.complex64)}, "params: 'a' is of dtype complex64; allowed are"),
        ({"a": {"b": "text"}}, "params: 'a/b' is of dtype <U4; allowed are"),
        ({"a": np.full(2, 1e300)}, "params: 'a' has the value 1e+300, which float32 cannot hold"),
        ({"n": np.int32(1)}, "params: there is no floating-point array; there is nothing to train"),
        ({}, "params: there is no floating-point array; there is nothing to train"),
        ({"a/b": ONES, "a": {"b": ONES}}, "params: two tensors are called 'a/b'"),
        ({"a": ONES, "a/b": ONES}, "params: two tensors are called 'a/b', or one"),
        ({"a": np.ma.masked_array([1.0, 2.0], [0, 1])}, "params: 'a' is a masked array in which"),
    ],
)
def test_what_no_tree_of_parameters_is_gets_a_line(tree, message):
    with pytest.raises(ValueError, match=r".") as error:
        read_params(tree)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_values_that_are_not_finite_are_told():
    with pytest.warns(UserWarning, match="^params: 'w' has values that are not finite$"):
        read_params({"w": np.array([1.0, np.nan], np.float32)})


@pytest.mark.usefixtures("quick_compilation")
def test_a_model_of_lists_with_a_counter_and_a_key_is_federated():
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    params = [{"w": normal(4, 8), "b": normal(8)}, {"w": normal(8, 3)}, 2, jax.random.key(0)]

    def apply_fn(params, batch, key):
        first, last, power, _ = params
        x = jnp.tanh(batch["x"] @ first["w"] + first["b"][None]) ** power
        return x @ last["w"]

    rows = {"x": normal(9, 4), "label": random.integers(0, 3, 9)}
    result = federate(
        (apply_fn, params),
        [rows, rows],
        rows,
        p1=0.0,
        p2=0.5,
        sampling="fixed_count",
        rounds=1,
        client={"steps": 1, "trained": ("head",)},
        evaluation={"proxy_samples": 2},
    )
    travels = {row.path: row.travels for row in result.tensors}
    assert travels == {
        "0/b": "float32, visible columns; frozen",
        "0/w": "4-bit NormalFloat, block 64, visible columns; frozen",
        "1/w": "float32, whole",
    }
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    np.testing.assert_array_equal(result.params[0]["w"], params[0]["w"])
    assert not np.array_equal(result.params[1]["w"], params[1]["w"])
    assert result.params[2] == 2
