"""Learned biases of attention by relative position, as T5 has them (arXiv 1910.10683)."""

import math

import jax.numpy as jnp
from flax import linen as nn

from fedqsn_jax.core.types import Array


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances.

    Attributes:
      heads: Attention heads.
      bidirectional: Whether keys behind the query have buckets of their own.
      buckets: Number of buckets.
      max_distance: The distance from which on all share the last one.
      stddev: Of the initial values.
    """

    heads: int
    bidirectional: bool
    buckets: int
    max_distance: int
    stddev: float

    @nn.compact
    def __call__(self, queries: Array, keys: Array) -> Array:
        """Returns float32 ``[1, heads, queries, keys]`` of positions, int32 ``[any]`` each."""
        distances = keys.reshape(1, -1) - queries.reshape(-1, 1)
        buckets = relative_buckets(distances, self.bidirectional, self.buckets, self.max_distance)
        shape = (self.buckets, self.heads)
        table = self.param("embedding", nn.initializers.normal(self.stddev), shape)
        return jnp.take(table, buckets, axis=0).transpose(2, 0, 1)[None]


def relative_buckets(
    distances: Array, bidirectional: bool, buckets: int, max_distance: int
) -> Array:
    """Returns the bucket, int32, of each distance from a query to a key.

    Half of the buckets are for one distance each, the other half for ranges that grow with the
    distance, up to ``max_distance`` and beyond.

    Args:
      distances: int32, key's position less query's.
      bidirectional: Whether keys behind the query have buckets of their own (half of all), or
        count as distance 0.
      buckets: Their number.
      max_distance: From here on all distances share the last one.
    """
    offset: Array | int = 0
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distances > 0, buckets, 0)
        distances = jnp.abs(distances)
    else:
        distances = jnp.maximum(-distances, 0)
    exact = buckets // 2
    growth = jnp.log(jnp.maximum(distances, 1).astype(jnp.float32) / exact)
    wide = exact + growth / math.log(max_distance / exact) * (buckets - exact)
    wide = jnp.minimum(wide.astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distances < exact, distances, wide)
