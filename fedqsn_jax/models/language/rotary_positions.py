"""Rotary positions (arXiv 2104.09864): pairs of a head's entries turn with the position."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from fedqsn_jax.core.types import Array


class RopeScaling(NamedTuple):
    """How LLaMA 3 stretches the rotary periods beyond the lengths that it was first trained on.

    Attributes:
      factor: Periods much longer than the original length are stretched by it.
      low_frequency_factor: The original length over this is the shortest period that is stretched
        by the whole factor.
      high_frequency_factor: The original length over this is the longest that is not stretched.
      original_length: The number of positions of the first training.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


def rope_frequencies(size: int, base: float, scaling: RopeScaling | None = None) -> list[float]:
    """Returns the ``size / 2`` angular frequencies of rotary positions (arXiv 2104.09864).

    Args:
      size: Width of a head.
      base: The period of the slowest pair of entries, over 2 pi, roughly.
      scaling: LLaMA 3's (arXiv 2407.21783), or None.
    """
    frequencies = [base ** (-2 * index / size) for index in range(size // 2)]
    if scaling is None:
        return frequencies

    def stretched(frequency: float) -> float:
        # How often the pair turns within the original length.
        turns = scaling.original_length * frequency / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        share = min(max((turns - low) / (high - low), 0), 1)
        return frequency * (share + (1 - share) / scaling.factor)

    return [stretched(frequency) for frequency in frequencies]


def rotation_of(positions: Array, frequencies: list[float]) -> tuple[Array, Array]:
    """Returns cosines and sines, float32 ``[rows, length, 1, size / 2]``, of int32 positions."""
    angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.float32).reshape(1, 1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: Array, rotation: tuple[Array, Array]) -> Array:
    """Turns entry i with entry ``i + size / 2`` of each head, ``[rows, length, heads, size]``."""
    cosine, sine = rotation
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(heads.dtype)
