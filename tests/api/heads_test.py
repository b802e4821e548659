"""The task head is found by what it does, whatever its name."""

import jax
import jax.numpy as jnp
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
