"""Poisson cohorts: each client takes part with one probability, whoever else does.

They are what the accounting of differential privacy likes best. A compiled round has a static
number of places, about 4.4 standard deviations more than are taken on average; the others stand
empty. Of clients that are drawn beyond the places a uniform subset takes part, as the truncated
event of the accounting has it (arXiv 2508.15089).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import bdtr

from fedqsn_jax.core.keys import fold_in_name, keyed_permutation
from fedqsn_jax.core.types import Array, Key

NOBODY = -1
"""What stands in an empty place instead of a client's id."""
_DEVIATIONS = 4.4


def poisson_places(population: int, expected: int) -> int:
    """Returns the number of places of a cohort: a static one, at most the population.

    Args:
      population: Number of clients.
      expected: How many take part on average.
    """
    deviation = math.sqrt(expected * (1 - expected / population))
    return min(population, math.ceil(expected + _DEVIATIONS * deviation))


def sample_poisson_cohort(key: Key, population: int, expected: int) -> Array:
    """Draws each client with the probability ``expected / population``.

    A binomial number of clients, and so many of them without replacement, are the same in
    distribution as a draw for each; they cost operations in proportion to the places alone.

    Args:
      key: The round's key. It must be secret: what is claimed holds for those who do not know who
        takes part.
      population: Number of clients.
      expected: How many take part on average, 1 to the population.

    Returns:
      Distinct ids, int32 ``[poisson_places(population, expected)]``, `NOBODY` in empty places,
      which are the last.

    Raises:
      ValueError: The expected number is not allowed.
    """
    if not 1 <= expected <= population:
        raise ValueError(
            f"cohort of {expected} clients: allowed are 1 to the population, {population}"
        )
    places = jnp.arange(poisson_places(population, expected), dtype=jnp.int32)
    words = jax.random.bits(fold_in_name(key, "number of clients"), (2,), jnp.uint32)
    count = _binomial(words, population, expected / population, len(places))
    ids = keyed_permutation(key, places, population)
    return jnp.where(places < count, ids, NOBODY)


def _binomial(words: Array, trials: int, probability: float, most: int) -> Array:
    """The inverse of the binomial distribution, to 53 bits; what is above ``most`` becomes that."""
    below = bdtr(np.arange(most, dtype=np.float64), trials, probability) * 2.0**32
    high = np.floor(below)
    low = np.floor((below - high) * 2.0**32)
    # A probability of one is met by all words but the very largest.
    certain = high >= 2**32
    high, low = (np.where(certain, 2**32 - 1, word).astype(np.uint32) for word in (high, low))
    reached = (words[0] > high) | ((words[0] == high) & (words[1] >= low))
    return reached.sum(dtype=jnp.int32)
