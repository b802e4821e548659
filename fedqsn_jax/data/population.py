"""The rows of all clients in one set of flat arrays, and the splits of a data set."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from fedqsn_jax.core.arrays import read_array
from fedqsn_jax.core.types import Array, Batch


class ClientData(Protocol):
    """The examples of a population, as a round asks for them inside ``jit``; a pytree.

    `FederatedData` has them on the device, `streamed.StreamedData` those of the clients that take
    part next, `generated.GeneratedData` makes them when they are used.
    """

    @property
    def clients(self) -> int:
        """Number of clients in the population."""

    @property
    def device_bytes(self) -> int:
        """Bytes that the examples take on a device."""

    def rows(self, client_id: Array) -> Array:
        """Number of a client's rows, int32, in the shape of ``client_id``."""

    def gather(self, client_id: Array, indices: Array) -> Batch:
        """Rows of one client, ``indices`` int32 ``[rows]`` from 0 on, as a batch."""


@struct.dataclass
class FederatedData:
    """The examples of every client, on the device.

    Attributes:
      examples: Named arrays ``[rows, ...]``, the clients' rows one after the other.
      offsets: int32 ``[clients + 1]``; client k has the rows ``offsets[k]`` to ``offsets[k + 1]``.
    """

    examples: Batch
    offsets: Array

    @property
    def clients(self) -> int:
        """Number of clients in the population."""
        return self.offsets.shape[0] - 1

    @property
    def device_bytes(self) -> int:
        """Bytes that the examples and offsets take on a device."""
        return sum(array.nbytes for array in (*self.examples.values(), self.offsets))

    def rows(self, client_id: Array) -> Array:
        """Number of a client's rows, int32."""
        return self.offsets[client_id + 1] - self.offsets[client_id]

    def gather(self, client_id: Array, indices: Array) -> Batch:
        """Returns the rows ``indices`` of a client, int32 ``[...]`` from 0 on."""
        places = self.offsets[client_id] + indices
        return {name: array[places] for name, array in self.examples.items()}


class Splits(NamedTuple):
    """A data set as a run needs it.

    Attributes:
      clients: The clients' rows, on the device or (`streamed.HostData`) on the host.
      private: The server's rows, named arrays ``[rows, ...]``; possibly no rows.
      test: Held-out rows, named arrays ``[rows, ...]``.
      num_classes: Number of labels.
      client_tests: Rows of clients that are held out, by group; see `held_out.hold_out`.
    """

    clients: ClientData
    private: Batch
    test: Batch
    num_classes: int
    client_tests: dict[str, FederatedData] = {}  # noqa: RUF012


def join_clients(
    clients: Sequence[dict[str, np.ndarray]],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Joins per-client arrays, on the host.

    Args:
      clients: For each client named arrays ``[rows, ...]``; names, dtypes and the shapes of a row
        are the same for all, the numbers of rows may differ and may be zero.

    Returns:
      Named arrays ``[rows, ...]`` with the clients' rows one after the other, and the offsets,
      int64 ``[clients + 1]``.

    Raises:
      ValueError: There is no client, an array is none of those that are allowed (see
        `arrays.read_array`), or names, shapes or numbers of rows do not agree.
    """
    if not clients:
        raise ValueError("no clients: at least one is needed")
    names = sorted(clients[0])
    lengths = []
    clients = [
        {name: read_array(array, f"client {index}: {name!r}") for name, array in client.items()}
        for index, client in enumerate(clients)
    ]
    for index, client in enumerate(clients):
        if sorted(client) != names:
            raise ValueError(f"client {index} has arrays {sorted(client)}, client 0 has {names}")
        rows = {len(array) for array in client.values()}
        if len(rows) != 1:
            raise ValueError(f"client {index}: its arrays differ in their number of rows")
        for name, array in client.items():
            ours, first = (
                f"{each.dtype}{list(each.shape[1:])}" for each in (array, clients[0][name])
            )
            if ours != first:
                raise ValueError(f"client {index}: {name!r} is {ours} a row, client 0's is {first}")
        lengths.append(rows.pop())
    examples = {name: np.concatenate([c[name] for c in clients]) for name in names}
    return examples, np.cumsum([0, *lengths], dtype=np.int64)


def from_clients(clients: Sequence[dict[str, np.ndarray]]) -> FederatedData:
    """Joins per-client arrays into `FederatedData`; see `join_clients`.

    Raises:
      ValueError: There is no client, or names, shapes or numbers of rows do not agree.
    """
    return from_host(*join_clients(clients))


def from_host(examples: dict[str, np.ndarray], offsets: np.ndarray) -> FederatedData:
    """Returns the joined rows of clients on the device; see `join_clients`."""
    on_device = {name: jnp.asarray(array) for name, array in examples.items()}
    return FederatedData(on_device, jnp.asarray(offsets, jnp.int32))


def single_client(examples: Batch) -> FederatedData:
    """Returns the population of one client that has all the rows; used for server training."""
    rows = jax.tree.leaves(examples)[0].shape[0]
    return FederatedData(examples, jnp.asarray([0, rows], jnp.int32))


@struct.dataclass
class HeldOut:
    """What a run is evaluated on.

    Attributes:
      test: Rows of no client, named arrays ``[rows, ...]``.
      clients: Rows of clients, by group: `OWN`, `NEW`; groups may be absent.
      validation: Rows of the server that no training sees, on which settings are chosen during the
        run; None: there are none.
    """

    test: Batch
    clients: dict[str, FederatedData]
    validation: Batch | None = None
