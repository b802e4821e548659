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


class LinearScaling(NamedTuple):
    """Positions are divided by a factor.

    Attributes:
      factor: The factor.
    """

    factor: float


class DynamicScaling(NamedTuple):
    """Periods that grow with a sequence beyond the model's positions; up to these, the plain ones.

    Attributes:
      factor: How they grow. Longer sequences are refused here, so that nothing depends on it.
    """

    factor: float


class YarnScaling(NamedTuple):
    """YaRN (arXiv 2309.00071): long periods are stretched, short ones are not.

    Attributes:
      factor: By which long periods are stretched.
      attention_factor: What cosines and sines are multiplied by.
      fast: A pair of entries that turns so often within the original length is not stretched.
      slow: One that turns so often is stretched by the whole factor.
      original_length: The number of positions of the first training.
      whole: Whether the first and last pair in between are rounded outwards.
    """

    factor: float
    attention_factor: float
    fast: float
    slow: float
    original_length: int
    whole: bool = True


class LongScaling(NamedTuple):
    """LongRoPE (arXiv 2402.13753): every pair of entries has a factor of its own.

    Attributes:
      short: By which periods are stretched in sequences of up to the original length. Longer ones,
        for which there are other factors, are refused here.
      long: Those others, which are kept for files that are written.
      attention_factor: What cosines and sines are multiplied by.
      original_length: The number of positions of the first training.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float
    original_length: int


Scaling = RopeScaling | LinearScaling | DynamicScaling | YarnScaling | LongScaling


def rope_frequencies(size: int, base: float, scaling: Scaling | None = None) -> list[float]:
    """Returns the ``size / 2`` angular frequencies of rotary positions (arXiv 2104.09864).

    Args:
      size: Width of a head.
      base: The period of the slowest pair of entries, over 2 pi, roughly.
      scaling: How they are changed, or None.
    """
    frequencies = [base ** (-2 * index / size) for index in range(size // 2)]
    if isinstance(scaling, LinearScaling):
        return [frequency / scaling.factor for frequency in frequencies]
    if isinstance(scaling, LongScaling):
        return [one / factor for one, factor in zip(frequencies, scaling.short, strict=True)]
    if isinstance(scaling, YarnScaling):
        shares = _unstretched_shares(size, base, scaling)
        return [
            frequency * (share + (1 - share) / scaling.factor)
            for frequency, share in zip(frequencies, shares, strict=True)
        ]
    if not isinstance(scaling, RopeScaling):
        return frequencies

    def stretched(frequency: float) -> float:
        # How often the pair turns within the original length.
        turns = scaling.original_length * frequency / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        share = min(max((turns - low) / (high - low), 0), 1)
        return frequency * (share + (1 - share) / scaling.factor)

    return [stretched(frequency) for frequency in frequencies]


def _unstretched_shares(size: int, base: float, scaling: YarnScaling) -> list[float]:
    """For each pair of entries how much of its frequency is kept: 1 for short periods."""

    def pair_that_turns(times: float) -> float:
        ratio = scaling.original_length / (times * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(base))

    first, last = pair_that_turns(scaling.fast), pair_that_turns(scaling.slow)
    if scaling.whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last += 0.001 if first == last else 0
    return [1 - min(max((pair - first) / (last - first), 0), 1) for pair in range(size // 2)]


def rotation_of(
    positions: Array, frequencies: list[float], scaling: Scaling | None = None
) -> tuple[Array, Array]:
    """Returns cosines and sines, float32 ``[rows, length, 1, size / 2]``, of int32 positions."""
    angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.float32).reshape(1, 1, 1, -1)
    factor = getattr(scaling, "attention_factor", 1.0)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(heads: Array, rotation: tuple[Array, Array]) -> Array:
    """Turns entry i with entry ``i + turned / 2`` of each head, ``[rows, length, heads, size]``.

    The first entries of a head are turned, twice as many as there are angles.
    """
    cosine, sine = rotation
    turning = 2 * cosine.shape[-1]
    first, second = jnp.split(heads[..., :turning].astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    whole = jnp.concatenate(turned, axis=-1).astype(heads.dtype)
    return jnp.concatenate([whole, heads[..., turning:]], axis=-1)
