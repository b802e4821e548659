"""The keys and values of tokens that a decoder has seen: a cache in, a cache out.

A cache has slots of a fixed number, so that a jitted step compiles once. New tokens take the next
slots in every row, padding included; a mask says which slots hold real tokens, and positions count
those only. So rows of different lengths need no alignment, and padding may stand on either side.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.types import Array


@struct.dataclass
class Cache:
    """What a stack of layers has seen.

    Attributes:
      key: ``[layers, rows, slots, key heads, head size]``.
      value: The same.
      mask: bool ``[rows, slots]``: the slots that hold a real token.
      used: int32 scalar: the slots that were written, in every row.
    """

    key: Array
    value: Array
    mask: Array
    used: Array

    @property
    def arrays(self) -> tuple[Array, Array]:
        """Keys and values, as layers carry them."""
        return self.key, self.value

    def written(self, arrays: tuple[Array, Array], count: int) -> "Cache":
        """Returns the cache after the layers wrote ``count`` tokens to its arrays."""
        return dataclasses.replace(self, key=arrays[0], value=arrays[1], used=self.used + count)

    def take_rows(self, rows: Array) -> "Cache":
        """Gathers rows, int32 ``[any]``, which may repeat."""
        return Cache(
            key=jnp.take(self.key, rows, axis=1),
            value=jnp.take(self.value, rows, axis=1),
            mask=jnp.take(self.mask, rows, axis=0),
            used=self.used,
        )


def empty_cache(layers: int, rows: int, slots: int, heads: int, size: int, dtype: str) -> Cache:
    """Returns a cache without tokens; see `Cache` for the sizes."""
    zeros = jnp.zeros((layers, rows, slots, heads, size), dtype)
    return Cache(zeros, zeros, jnp.zeros((rows, slots), bool), jnp.int32(0))


def positions_of(mask: Array, cache: Cache | None = None) -> Array:
    """Returns int32 ``[rows, length]``: how many real tokens stand before each, in cache and row.

    Args:
      mask: bool ``[rows, length]``: which tokens are real.
      cache: What was seen before them.
    """
    counts = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    if cache is not None:
        counts += cache.mask.sum(axis=1, dtype=jnp.int32, keepdims=True)
    return jnp.maximum(counts - 1, 0)


def attendable(
    mask: Array, cache: Cache | None, padded: bool = True
) -> tuple[Array | None, Cache | None]:
    """Says what new tokens may attend to, and notes them in the cache.

    Args:
      mask: bool ``[rows, length]``: which of the new tokens are real.
      cache: What was seen before them.
      padded: Whether any may be padding.

    Returns:
      Without a cache, bool ``[rows, 1, 1, length]``, or None where nothing is padding; causality is
      left to the attention. With one, bool ``[rows, 1, length, slots]``, causal; and the cache with
      the new tokens' mask, their keys and values still to be written at ``used``.
    """
    if cache is None:
        return jnp.expand_dims(mask, (1, 2)) if padded else None, None
    length, slots = mask.shape[1], cache.mask.shape[1]
    seen = jax.lax.dynamic_update_slice(cache.mask, mask, (0, cache.used))
    last = cache.used + jnp.arange(length, dtype=jnp.int32)
    causal = jnp.arange(slots, dtype=jnp.int32).reshape(1, -1) <= last.reshape(-1, 1)
    pairs = jnp.expand_dims(seen, (1, 2)) & jnp.expand_dims(causal, (0, 1))
    return pairs, dataclasses.replace(cache, mask=seen)


def within_window(
    seen: Array | None, mask: Array, cache: Cache | None, window: int
) -> Array | None:
    """Narrows what new tokens may attend to: to the last so many real tokens, their own included.

    Args:
      seen: What `attendable` gave.
      mask: bool ``[rows, length]``: which of the new tokens are real.
      cache: What `attendable` gave.
      window: The number of tokens.

    Returns:
      bool ``[rows, 1, length, keys]``; or ``seen``, where there are no more keys than that.
    """
    present = mask if cache is None else cache.mask
    if present.shape[1] <= window:
        return seen
    keys = positions_of(present)
    # New tokens stand behind those in the cache, which has noted their masks.
    queries = (
        keys
        if cache is None
        else jax.lax.dynamic_slice_in_dim(keys, cache.used, mask.shape[1], axis=1)
    )
    near = jnp.expand_dims(keys[:, None] > queries[..., None] - window, 1)
    return near if seen is None else near & seen


def write(stacked: Array, layer: Array, used: Array, new: Array) -> tuple[Array, Array]:
    """Writes a layer's new keys, or values, into the slots from ``used`` on.

    Args:
      stacked: ``[layers, rows, slots, heads, size]``. All layers' arrays are carried from layer to
        layer and not sliced and stacked again, so that XLA can write in place.
      layer: The layer, int32 scalar.
      used: The first slot, int32 scalar.
      new: ``[rows, length, heads, size]``.

    Returns:
      The stacked array, and of it this layer's ``[rows, slots, heads, size]``.
    """
    start = (layer, 0, used, 0, 0)
    stacked = jax.lax.dynamic_update_slice(stacked, new.astype(stacked.dtype)[None], start)
    return stacked, jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def last_real(hidden: Array, mask: Array) -> Array:
    """Returns ``[rows, 1, width]``: the hidden state of each row's last real token."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last.reshape(-1, 1, 1), axis=1)
