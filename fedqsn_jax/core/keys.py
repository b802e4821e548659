"""Keys and permutations that do not depend on position, padding or devices.

Every draw of a run is addressed: ``fold_in(root, round)``, then ``fold_in(., client id)``, then a
name. A client's draws are therefore the same wherever it stands in the cohort, however the cohort
is cut into chunks and whatever else is drawn.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.types import Array, Key

_PERMUTATION_ROUNDS = 32


def root_key(seed: int) -> Key:
    """Returns the key from which everything in a run is drawn."""
    return jax.random.key(np.uint32(seed))


def federation_key(seed: int) -> Key:
    """Returns the key that `Federation.init` gets."""
    return fold_in_name(root_key(seed), "federation")


def fold_in_name(key: Key, name: str) -> Key:
    """Returns the key that belongs to ``name`` under ``key`` (the name's CRC-32 is folded in)."""
    return jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))


def client_round_key(key: Key, round_index: Array | int, client_id: Array | int) -> Key:
    """Returns the key of one client in one round, the same in any cohort order."""
    return jax.random.fold_in(jax.random.fold_in(key, round_index), client_id)


def sticky_client_key(key: Key, client_id: Array | int) -> Key:
    """Returns the key of one client for all rounds."""
    return jax.random.fold_in(fold_in_name(key, "of a client for all rounds"), client_id)


def leak_tracing_key(key: Key, client_id: Array | int) -> Key:
    """Returns the key of one client's rounding for all rounds."""
    return jax.random.fold_in(fold_in_name(key, "leak tracing"), client_id)


def keyed_permutation(key: Key, positions: Array, length: Array | int) -> Array:
    """Images of ``positions`` under a pseudo-random permutation of ``range(length)``.

    A swap-or-not shuffle (Hoang, Morris, Rogaway, CRYPTO 2012): in every round a position and its
    mirror image about a random pivot change places or stay, by one hashed bit that both share. It
    is a bijection for any length, needs no sort and no array of that length, and the answer for a
    position depends on nothing but ``(key, position, length)``, so one minibatch of a client, or
    a cohort out of a million clients, costs as many operations as it has elements. It is made for
    sampling, not for cryptography.

    Args:
      key: A pseudo-random key.
      positions: Integers ``[...]`` in ``[0, length)``; others give meaningless results.
      length: The number of elements that are permuted, at least 1; may be traced.

    Returns:
      int32 ``[...]``, distinct for distinct positions, in ``[0, length)``.
    """
    if isinstance(length, int) and length == 1:
        return jnp.zeros_like(positions, jnp.int32)
    size = jnp.asarray(length, jnp.uint32)
    words = jax.random.bits(key, (_PERMUTATION_ROUNDS, 2), jnp.uint32)

    def maybe_swap(index: Array, words: Array) -> tuple[Array, None]:
        pivot, salt = words[0] % jnp.maximum(size, 1), words[1]
        mirrored = jnp.where(index <= pivot, pivot - index, pivot - index + size)
        swap = _hash(jnp.maximum(index, mirrored) ^ salt) >> 31
        return jnp.where(swap == 1, mirrored, index), None

    def shuffle(index: Array, words: Array, unroll: int) -> Array:
        return jax.lax.scan(maybe_swap, index, words, unroll=unroll)[0]

    # A loop runs as fast on a CPU and takes a thirtieth of the time to compile; elsewhere each of
    # its steps would be a program of its own to start.
    index = jax.lax.platform_dependent(
        positions.astype(jnp.uint32),
        words,
        cpu=functools.partial(shuffle, unroll=1),
        default=functools.partial(shuffle, unroll=_PERMUTATION_ROUNDS),
    )
    return index.astype(jnp.int32)


def _hash(word: Array) -> Array:
    """The 32-bit finalizer of MurmurHash3: every input bit moves every output bit."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
