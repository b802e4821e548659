"""Dropout from a counter-based hash: an entry's bits depend on the key and its position alone.

Random bits are most of what dropout costs on a GPU when a generator writes them to memory. Here
they are a few integer operations an entry, which fuse into whatever reads or writes the values, and
the backward pass computes them again instead of storing which entries were kept. Since a position
is hashed axis by axis, draws do not depend on the array's size: padding changes nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedqsn_jax.core.types import Array, Key

Words = Array | tuple[Array, Array]
"""Two uint32 scalars, or an array of them: what a key's draws depend on."""


class Dropout(nn.Module):
    """Zeroes entries with probability ``rate`` and scales the others; see `drop`.

    Attributes:
      rate: The probability that an entry is dropped.
      train: Whether it acts.
    """

    rate: float
    train: bool

    @nn.compact
    def __call__(self, values: Array) -> Array:
        """Returns ``values``, or where it trains, ``values`` with entries dropped."""
        if not self.train or self.rate == 0:
            return values
        return drop(self.make_rng("dropout"), values, self.rate)


def drop(key: Key, values: Array, rate: float) -> Array:
    """Zeroes entries with probability ``rate`` and divides the others by the share that is kept.

    Args:
      key: A key that is used for nothing else.
      values: Floating, at least one axis.
      rate: Rounded to a multiple of ``2**-32``; the expectation is exact.
    """
    return _drop(rate, words_of(key), values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _drop(rate: float, words: Array, values: Array) -> Array:
    kept = is_kept(streams_of(words, values.shape[:-1]), _last_index(values), rate)
    scale = jnp.asarray(kept_scale(rate), values.dtype)
    return jnp.where(kept, values * scale, jnp.zeros((), values.dtype))


def _drop_forward(rate, words, values):
    return _drop(rate, words, values), words


def _drop_backward(rate, words, cotangent):
    return None, _drop(rate, words, cotangent)


_drop.defvjp(_drop_forward, _drop_backward)


def _last_index(values: Array) -> Array:
    shape = (1,) * (values.ndim - 1) + values.shape[-1:]
    return jax.lax.broadcasted_iota(jnp.uint32, shape, values.ndim - 1)


def streams_of(words: Array, shape: tuple[int, ...]) -> Array:
    """Hashes positions along all axes but the last, whose sizes are ``shape``.

    Returns:
      uint32, ``shape`` and a last axis of size one.
    """
    stream = jnp.broadcast_to(stream_of(words), (1,) * (len(shape) + 1))
    for axis, size in enumerate(shape):
        sizes = [1] * (len(shape) + 1)
        sizes[axis] = size
        stream = fold(words, stream, jax.lax.broadcasted_iota(jnp.uint32, sizes, axis))
    return stream


def words_of(key: Key) -> Array:
    """The two words, uint32 ``[2]``, that the draws of a key depend on.

    They are the key's own: keys are made by hashing, and one is used for one draw only.
    """
    return jax.random.key_data(key).reshape(-1)[:2]


def stream_of(words: Words) -> Array:
    """Where hashing begins: a uint32 scalar."""
    return mixed(words[0]) + words[1]


def fold(words: Words, stream: Array, index: Array) -> Array:
    """Hashes a position along one more axis, uint32 like the streams, which broadcast."""
    return mixed(stream ^ index) + words[1]


def is_kept(stream: Array, index: Array, rate: float) -> Array:
    """Whether entries with positions ``index`` along the last axis are kept."""
    return mixed(stream ^ index) >= np.uint32(_threshold(rate))


def kept_scale(rate: float) -> float:
    """What kept entries are multiplied by."""
    return 1 / (1 - _threshold(rate) / 2**32)


def _threshold(rate: float) -> int:
    return min(round(rate * 2**32), 2**32 - 1)


def mixed(words: Array) -> Array:
    """A bijection of uint32 in which each bit depends on all (Wellons' ``lowbias32``)."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x7FEB352D)
    words = (words ^ (words >> np.uint32(15))) * np.uint32(0x846CA68B)
    return words ^ (words >> np.uint32(16))
