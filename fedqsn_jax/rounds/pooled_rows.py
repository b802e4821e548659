"""The rows that colluders own: pooled, with a fifth held back by which they choose their attack."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fedqsn_jax.core.types import Array, Batch
from fedqsn_jax.data.population import ClientData

_ONE_IN = 5
"""One row in so many is held back."""


@struct.dataclass
class PooledRows:
    """A coalition's rows, padded so that coalitions of any size share compiled programs.

    Attributes:
      train: Named arrays ``[places, ...]``; only the first ``trained`` count.
      trained: Number of rows that are trained on, int32 scalar.
      held: Named arrays ``[places, ...]``; only the first ``kept`` count.
      kept: Number of rows that are held back, int32 scalar.
    """

    train: Batch
    trained: Array
    held: Batch
    kept: Array


def client_rows(data: ClientData, client: int) -> dict[str, np.ndarray]:
    """All rows of one client, named arrays ``[rows, ...]`` on the host."""
    offsets = getattr(data, "offsets", None)
    examples = getattr(data, "examples", None)
    if offsets is None or examples is None:
        count = int(data.rows(jnp.int32(client)))
        indices = jnp.arange(count, dtype=jnp.int32)
        return {
            name: np.asarray(array)
            for name, array in data.gather(jnp.int32(client), indices).items()
        }
    own = slice(int(offsets[client]), int(offsets[client + 1]))
    return {name: np.asarray(array[own]) for name, array in examples.items()}


class Divided(NamedTuple):
    """A coalition's rows on the host.

    Attributes:
      train: Rows to train on; none if the coalition has only one.
      held: Rows that are held back.
      owners: Whose each row of ``train`` is: a position among the members, int ``[rows]``.
    """

    train: dict[str, np.ndarray]
    held: dict[str, np.ndarray]
    owners: np.ndarray


def divide(data: ClientData, members: Sequence[int], seed: int) -> Divided:
    """Pools the members' rows and holds a fifth back, rounded up, drawn from the seed."""
    each = [client_rows(data, int(member)) for member in members]
    counts = [len(next(iter(rows.values()))) for rows in each]
    pooled = {name: np.concatenate([rows[name] for rows in each]) for name in each[0]}
    owners = np.repeat(np.arange(len(members)), counts)
    order = np.random.default_rng([seed, len(members)]).permutation(sum(counts))
    held = -(-sum(counts) // _ONE_IN)
    kept, trained = order[:held], order[held:]
    return Divided(
        {name: array[trained] for name, array in pooled.items()},
        {name: array[kept] for name, array in pooled.items()},
        owners[trained],
    )


def pad(rows: dict[str, np.ndarray], places: int) -> Batch:
    """Repeats the last row up to a number of places; without rows all are zero."""

    def one(array: np.ndarray) -> jax.Array:
        missing = places - len(array)
        last = array[-1:] if len(array) else np.zeros((1, *array.shape[1:]), array.dtype)
        return jnp.asarray(np.concatenate([array, np.repeat(last, missing, axis=0)]))

    return {name: one(array) for name, array in rows.items()}


def pooled_rows(
    train: dict[str, np.ndarray], held: dict[str, np.ndarray], places: tuple[int, int]
) -> PooledRows:
    """Puts divided rows on the device, padded to so many places."""
    counts = [len(next(iter(rows.values()))) for rows in (train, held)]
    return PooledRows(
        pad(train, places[0]), jnp.int32(counts[0]), pad(held, places[1]), jnp.int32(counts[1])
    )
