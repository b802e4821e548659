"""Keys and permutations: bijections for any length, the same in any padding, uniform."""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_jax.core.keys import client_round_key, fold_in_name, keyed_permutation

PADDED = 1024
permute = jax.jit(keyed_permutation)
permute_keys = jax.jit(jax.vmap(keyed_permutation, in_axes=(0, None, None)))


def image(seed: int, length: int) -> np.ndarray:
    """The whole permutation; positions are padded so that every length shares one program."""
    padded = permute(jax.random.key(seed), jnp.arange(PADDED, dtype=jnp.int32), jnp.int32(length))
    return np.asarray(padded)[:length]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(length=st.integers(1, PADDED), seed=st.integers(0, 2**32 - 1))
def test_is_a_bijection(length, seed):
    np.testing.assert_array_equal(np.sort(image(seed, length)), np.arange(length))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 32, 33, PADDED - 1, PADDED])
def test_is_a_bijection_at_the_edges(length):
    for seed in range(5):
        np.testing.assert_array_equal(np.sort(image(seed, length)), np.arange(length))


def test_is_a_bijection_of_a_long_range():
    length = 100_003
    result = permute(jax.random.key(0), jnp.arange(length, dtype=jnp.int32), length)
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(np.bincount(result, minlength=length), np.ones(length))


def test_longest_range_of_int32():
    length = 2**31 - 1
    positions = np.unique(np.random.default_rng(0).integers(0, length, 5000))
    positions = np.concatenate([positions, [0, length - 1]]).astype(np.int32)
    result = np.asarray(permute(jax.random.key(3), jnp.asarray(positions), jnp.int32(length)))
    assert result.min() >= 0
    assert result.max() < length
    assert len(np.unique(result)) == len(np.unique(positions))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(length=st.integers(1, 200), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_each_position_is_answered_alone(length, seed, data):
    whole = image(seed, length)
    position = data.draw(st.integers(0, length - 1))
    alone = permute(jax.random.key(seed), jnp.int32(position), jnp.int32(length))
    assert int(alone) == whole[position]


def test_does_not_depend_on_padding_order_or_tracing():
    key, length = jax.random.key(7), 13
    expected = image(7, length)
    for size in (length, 64):
        result = permute(key, jnp.arange(size, dtype=jnp.int32), jnp.int32(length))
        np.testing.assert_array_equal(result[:length], expected)
    order = np.random.default_rng(0).permutation(length).astype(np.int32)
    result = permute(key, jnp.asarray(order), jnp.int32(length))
    np.testing.assert_array_equal(result, expected[order])
    grid = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
    np.testing.assert_array_equal(permute(key, grid, length), expected[:12].reshape(3, 4))
    lengths = jnp.asarray([5, length, 40], jnp.int32)
    vmapped = jax.vmap(permute, in_axes=(None, None, 0))
    batched = vmapped(key, jnp.arange(40, dtype=jnp.int32), lengths)
    np.testing.assert_array_equal(batched[1, :length], expected)


def test_depends_on_the_key():
    assert (image(0, 500) != image(1, 500)).mean() > 0.9


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


# The 1 - 1e-4 quantiles of the chi-square distribution, by degrees of freedom.
CRITICAL = {1: 15.14, 5: 25.74, 19: 50.80, 23: 57.07, 49: 94.60, 99: 160.06}


def images_over_keys(seed: int, positions: list[int], length: int) -> np.ndarray:
    """Images of four positions under 20,000 keys; one program for every length."""
    keys = jax.random.split(jax.random.key(seed), 20_000)
    return np.asarray(permute_keys(keys, jnp.int32(positions), jnp.int32(length)))


@pytest.mark.parametrize("length", [2, 3, 4])
def test_every_permutation_of_few_elements_is_equally_likely(length):
    images = images_over_keys(11, [0, 1, 2, 3], length)[:, :length]
    counts = np.array(
        [(images == order).all(axis=1).sum() for order in itertools.permutations(range(length))]
    )
    assert counts.sum() == len(images)
    assert chi_square(counts) < CRITICAL[len(counts) - 1]


def test_image_of_a_position_is_uniform():
    for images in images_over_keys(12, [0, 37, 50, 99], 100).T:
        assert chi_square(np.bincount(images, minlength=100)) < CRITICAL[99]


def test_images_of_a_pair_are_uniform():
    first, second = images_over_keys(13, [0, 1, 2, 3], 5).T[:2]
    counts = np.zeros((5, 5), int)
    np.add.at(counts, (first, second), 1)
    assert np.diagonal(counts).sum() == 0
    assert chi_square(counts[~np.eye(5, dtype=bool)]) < CRITICAL[19]


def test_minibatches_of_one_permutation_mix_the_range():
    """Where the first eighth of the positions goes: uniform over eighths of the range."""
    keys = jax.random.split(jax.random.key(14), 400)
    images = np.asarray(permute_keys(keys, jnp.arange(512, dtype=jnp.int32), 512))
    counts = np.zeros((8, 8), int)
    for eighth in range(8):
        block = images[:, eighth * 64 : (eighth + 1) * 64] // 64
        counts[eighth] = np.bincount(block.ravel(), minlength=8)
    assert chi_square(counts) < CRITICAL[49]


def data_of(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_fold_in_name_folds_in_the_crc_32():
    key = jax.random.key(5)
    for name in ("batches", "server_mask", ""):
        expected = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        assert data_of(fold_in_name(key, name)) == data_of(expected)


def test_keys_of_names_rounds_and_clients_are_distinct():
    key = jax.random.key(5)
    keys = [data_of(fold_in_name(key, name)) for name in ("a", "b", "ab", "ba", "")]
    keys += [data_of(client_round_key(key, r, c)) for r in range(6) for c in range(6)]
    assert len(set(keys)) == len(keys)


def test_client_round_key_is_the_same_traced():
    key = jax.random.key(5)
    traced = jax.jit(jax.vmap(client_round_key, in_axes=(None, None, 0)))
    keys = traced(key, jnp.int32(3), jnp.arange(4, dtype=jnp.int32))
    for client in range(4):
        assert data_of(keys[client]) == data_of(client_round_key(key, 3, client))
