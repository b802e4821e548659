"""Clients' rows that stay on the host, and those of them that the next rounds need on the device.

For populations that are larger than a device's memory. Who takes part in a round follows from the
key and the round alone, so the cohorts of a whole run are known before it starts. From them follow
the largest numbers of clients and rows of any call, hence one static shape for all calls: nothing
recompiles. While the device works on a call, the host gathers the rows of the next.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.arrays import read_array
from fedqsn_jax.core.types import Array, Batch
from fedqsn_jax.data.population import FederatedData
from fedqsn_jax.host.devices import device_bytes

_RESIDENT_SHARE = 0.5
"""Of a device's memory: what rows may take of it by themselves; the rest is the training's."""

_NO_CLIENT = np.iinfo(np.int32).max
"""The id in unused places: it sorts behind every client's."""


@dataclasses.dataclass(frozen=True)
class HostData:
    """The examples of every client, in the host's memory or in files that are mapped into it.

    A run streams them (`running.run_rounds`). It has the names of `ClientData` for whoever asks
    for sizes and shapes, but it is no pytree and does not enter ``jit``.

    Attributes:
      examples: Named arrays ``[rows, ...]``, the clients' rows one after the other; NumPy's,
        possibly memory-mapped; see `arrays.read_array`. On the device they have JAX's dtypes
        (float64 becomes float32).
      offsets: Integers ``[clients + 1]``; client k has the rows ``offsets[k]`` to
        ``offsets[k + 1]``.

    Raises:
      ValueError: An array has a dtype that is not allowed, or masked values.
    """

    examples: dict[str, np.ndarray]
    offsets: np.ndarray

    def __post_init__(self) -> None:
        if isinstance(self.examples, Mapping):  # Anything else is told by whoever reads it.
            examples = {
                name: read_array(array, f"HostData: {name!r}")
                for name, array in self.examples.items()
            }
            object.__setattr__(self, "examples", examples)

    @property
    def clients(self) -> int:
        """Number of clients in the population."""
        return len(self.offsets) - 1

    @property
    def device_bytes(self) -> int:
        """Bytes that the examples and offsets would take on a device, all of them."""
        return int(self.offsets[-1]) * self.row_bytes + 4 * len(self.offsets)

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes on a device."""
        return sum(
            int(np.prod(array.shape[1:])) * jax.dtypes.canonicalize_dtype(array.dtype).itemsize
            for array in self.examples.values()
        )

    def rows(self, client_id: Array) -> Array:
        """Number of a client's rows, int32, in the shape of ``client_id``."""
        return jnp.asarray(self.counts(np.asarray(client_id)), jnp.int32)

    def counts(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of clients' rows, int64, in the shape of ``ids``; computed on the host."""
        return np.asarray(self.offsets[ids + 1] - self.offsets[ids], np.int64)

    def gather(self, client_id: Array, indices: Array) -> Batch:
        """Returns the rows ``indices`` of a client, int32 ``[...]`` from 0 on."""
        places = self.offsets[np.asarray(client_id)] + np.asarray(indices)
        return {
            name: jnp.asarray(np.take(array, places, axis=0, mode="clip"))
            for name, array in self.examples.items()
        }


@struct.dataclass
class StreamedData:
    """The examples of some clients of a population, on the device: a `ClientData`.

    Attributes:
      examples: Named arrays ``[row capacity, ...]``, the clients' rows one after the other, then
        zeros.
      ids: The clients, int32 ``[client capacity]``, ascending; unused places have the largest
        int32.
      offsets: int32 ``[client capacity + 1]``; the client in place p has the rows ``offsets[p]``
        to ``offsets[p + 1]``.
      clients: Number of clients in the population (static).
    """

    examples: Batch
    ids: Array
    offsets: Array
    clients: int = struct.field(pytree_node=False)

    @property
    def device_bytes(self) -> int:
        """Bytes that the examples, ids and offsets take on a device."""
        return sum(a.nbytes for a in (*self.examples.values(), self.ids, self.offsets))

    def rows(self, client_id: Array) -> Array:
        """Number of a client's rows, int32; zero for clients that are not here."""
        place = self._place(client_id)
        count = self.offsets[place + 1] - self.offsets[place]
        return jnp.where(self.ids[place] == client_id, count, 0)

    def gather(self, client_id: Array, indices: Array) -> Batch:
        """Returns the rows ``indices`` of a client that is here, int32 ``[...]`` from 0 on."""
        places = self.offsets[self._place(client_id)] + indices
        return {name: array[places] for name, array in self.examples.items()}

    def _place(self, client_id: Array) -> Array:
        # Unrolled: a loop would be one more kernel launch for each of its turns.
        place = jnp.searchsorted(self.ids, client_id, method="scan_unrolled")
        return jnp.minimum(place, self.ids.shape[0] - 1).astype(jnp.int32)


class Capacity(NamedTuple):
    """The static shape of `StreamedData`.

    Attributes:
      clients: Most distinct clients of any call.
      rows: Most rows of any call.
    """

    clients: int
    rows: int

    def device_bytes(self, data: HostData) -> int:
        """Bytes that a call's rows take on a device."""
        return self.rows * data.row_bytes + 4 * (2 * self.clients + 1)


def capacity_for(data: HostData, calls: Sequence[np.ndarray]) -> Capacity:
    """Returns what holds the clients of any of several calls.

    Args:
      data: The population.
      calls: For each call the ids of those that take part, integers of any shape; repeated ids
        count once, negative ones are nobody's.
    """
    clients = rows = 1
    for ids in calls:
        distinct = _distinct(ids)
        clients = max(clients, len(distinct))
        rows = max(rows, int(data.counts(distinct).sum()))
    return Capacity(clients, rows)


def stream(data: HostData, cohorts: np.ndarray, capacity: Capacity) -> StreamedData:
    """Gathers the rows of some clients, and starts their transfer to the device.

    Args:
      data: The population.
      cohorts: Ids of those that take part, integers of any shape; repeated ids count once,
        negative ones are nobody's.
      capacity: The static shape; see `capacity_for`.
    """
    distinct = _distinct(cohorts)
    counts = data.counts(distinct)
    ends = np.cumsum(counts)
    total = int(counts.sum())
    # A place's row is as far behind its client's first row here as it is there.
    source = np.arange(total) + np.repeat(data.offsets[distinct] - (ends - counts), counts)
    examples = {}
    for name, array in data.examples.items():
        buffer = np.zeros((capacity.rows, *array.shape[1:]), array.dtype)
        # "clip" writes into the buffer at once; "raise" would fill a copy of it first.
        np.take(array, source, axis=0, out=buffer[:total], mode="clip")
        examples[name] = buffer
    unused = capacity.clients - len(distinct)
    places = np.pad(distinct, (0, unused), constant_values=_NO_CLIENT)
    offsets = np.pad(ends, (1, unused), constant_values=(0, total))
    sent: Any = jax.device_put((examples, places.astype(np.int32), offsets.astype(np.int32)))
    return StreamedData(sent[0], sent[1], sent[2], data.clients)


def _distinct(ids: np.ndarray) -> np.ndarray:
    return np.unique(ids[ids >= 0])


def place(data: HostData, resident: str) -> FederatedData | HostData:
    """Puts a population where it is configured to live.

    Args:
      data: The population.
      resident: ``device``, ``host``, or ``auto``: on the device if its rows take no more than half
        of a device's memory.

    Raises:
      ConfigError: The rows do not fit where they should be.
    """
    needed, available = data.device_bytes, device_bytes()
    if resident == "auto":
        resident = "device" if needed <= _RESIDENT_SHARE * available else "host"
    if resident == "host":
        return data
    if needed > available:
        raise ConfigError(
            f"data.resident = 'device': the clients' rows take {needed / 2**30:.1f} GiB, a device "
            f"has {available / 2**30:.1f} GiB; allowed are auto, host"
        )
    examples = {name: jnp.asarray(array) for name, array in data.examples.items()}
    return FederatedData(examples, jnp.asarray(data.offsets, jnp.int32))
