"""Dropout by a hash of positions: shares, independence, and what draws do not depend on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.models.kernels.dropout import drop, kept_scale

KEY = jax.random.key(0)


def kept(shape, rate=0.1, key=KEY):
    return np.asarray(drop(key, jnp.ones(shape), rate)) > 0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropped_entries_have_the_right_share_and_mean(rate):
    dropped = np.asarray(drop(KEY, jnp.ones((50, 20, 100)), rate))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(kept_scale(rate))}
    assert kept_scale(rate) == pytest.approx(1 / (1 - rate), rel=1e-8)
    spread = math.sqrt(rate * (1 - rate) / dropped.size)
    assert abs((dropped > 0).mean() - 1 + rate) < 4 * spread
    assert drop(KEY, jnp.ones(3, jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_neighbours_along_any_axis_rows_and_keys_are_independent():
    first = kept((64, 64, 64))
    others = [np.roll(first, 1, axis) for axis in range(3)]
    others += [kept(first.shape, key=jax.random.fold_in(KEY, index)) for index in range(3)]
    for other in others:
        both = (first & other).mean()
        assert abs(both - 0.9**2) < 4 * math.sqrt(0.81 * 0.19 / first.size)


def test_shares_of_rows_and_of_columns_spread_as_a_binomial_does():
    draws = kept((1024, 1024), 0.5)
    for axis in (0, 1):
        variance = draws.mean(axis=axis).var() * 1024 / 0.25
        assert abs(variance - 1) < 4 * math.sqrt(2 / 1024)


def test_draws_do_not_depend_on_padding_along_any_axis():
    whole = kept((5, 7, 9))
    np.testing.assert_array_equal(kept((3, 4, 6)), whole[:3, :4, :6])


def test_the_gradient_goes_where_the_values_went():
    values = jax.random.normal(jax.random.key(1), (4, 30))
    dropped, pull_back = jax.vjp(lambda values: drop(KEY, values, 0.3), values)
    (gradient,) = pull_back(values)
    np.testing.assert_array_equal(gradient, dropped)


def test_clients_side_by_side_draw_what_each_draws_alone():
    keys = jax.random.split(KEY, 3)
    values = jnp.ones((3, 4, 50))
    together = jax.vmap(lambda key, values: drop(key, values, 0.4))(keys, values)
    for key, row, expected in zip(keys, values, together, strict=True):
        np.testing.assert_array_equal(drop(key, row, 0.4), expected)
