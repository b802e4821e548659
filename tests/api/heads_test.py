"""The task head is found by what it does, whatever its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedqsn_jax.api.heads import Head, find_heads
from fedqsn_jax.models.functional import linen_apply, linen_init


class Network(nn.Module):
    outputs: int
    last: str = "whatever"

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.outputs)(x))
        x = nn.relu(nn.Dense(7)(x))
        return nn.Dense(self.outputs, name=self.last)(x)


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 2, 2, 2)
        for _ in range(12):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_it_is_the_last_layer_and_no_other_of_its_width(outputs):
    module, batch = Network(outputs), {"image": jnp.ones((3, 8))}
    params = linen_init(module, jax.random.key(0), batch)
    for seed in range(5):
        found = find_heads(linen_apply(module), params, batch, jax.random.key(seed))
        assert found == (Head("whatever/kernel", "whatever/bias"),)


@pytest.mark.usefixtures("quick_compilation")
def test_it_is_found_behind_many_convolutions():
    module, batch = Deep(), {"image": jnp.ones((3, 8))}
    params = linen_init(module, jax.random.key(0), batch)
    found = find_heads(linen_apply(module), params, batch, jax.random.key(1))
    assert found == (Head("Dense_0/kernel", "Dense_0/bias"),)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_it_is_found_whatever_the_rows_hold(value):
    module, batch = Network(3), {"image": jnp.full((3, 8), value)}
    params = linen_init(module, jax.random.key(0), batch)
    del params["whatever"]["bias"], params["Dense_0"]["bias"], params["Dense_1"]["bias"]

    def apply_fn(params, batch, key):
        x = batch["image"]
        for name in ("Dense_0", "Dense_1"):
            x = nn.relu(x @ params[name]["kernel"])
        return x @ params["whatever"]["kernel"]

    found = find_heads(apply_fn, params, batch, jax.random.key(0))
    assert found == (Head("whatever/kernel", None),)


class Tied(nn.Module):
    """A language model whose embedding is its head, with a bias elsewhere."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6, name="tokens")
        x = nn.Dense(6)(nn.gelu(embed(tokens).mean(1)))
        return embed.attend(x) + self.param("shift", nn.initializers.zeros, (11,))[None]


def test_an_embedding_that_is_used_once_more_at_the_end_is_a_head():
    batch = {"image": jnp.asarray([[1, 4], [4, 7], [0, 0]])}
    params = linen_init(Tied(), jax.random.key(0), batch)
    found = find_heads(linen_apply(Tied()), params, batch, jax.random.key(0))
    assert found == (Head("tokens/embedding", "shift"),)


def test_it_is_found_under_other_names_with_its_own_bias():
    shapes = {"w1": (8, 3), "b1": (3,), "w2": (3, 3), "b2": (3,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def apply_fn(params, batch, key):
        x = jnp.tanh(batch["image"] @ params["w1"] + params["b1"][None])
        return x @ params["w2"] + params["b2"][None]

    found = find_heads(apply_fn, params, {"image": jnp.ones((3, 8))}, jax.random.key(0))
    assert found == (Head("w2", "b2"),)
