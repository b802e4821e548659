"""Populations whose examples are made on the device, from the client's id, when they are used."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.types import Array, Batch


@struct.dataclass
class GeneratedData:
    """Clients that take no memory, however many there are: `ClientData` by two pure functions.

    For simulations of populations that fit nowhere, and for synthetic tasks.

    Example:
      >>> import jax
      >>> def example(client_id, index):
      ...     key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), client_id), index)
      ...     x = jax.random.normal(key, (4,))
      ...     return {"x": x, "label": (x.sum() > 0).astype("int32")}
      >>> data = GeneratedData(10**6, row_count=lambda ids: 20 + ids % 7, example=example)
      >>> data.gather(jax.numpy.int32(123_456), jax.numpy.arange(8))["x"].shape
      (8, 4)

    Attributes:
      clients: Number of clients (static).
      row_count: ``client ids -> numbers of rows``, int32 ``[...]`` (static).
      example: ``(client id, index) -> row``, named arrays without a rows axis, of int32 scalars
        (static). The same arguments must give the same row.
    """

    clients: int = struct.field(pytree_node=False)
    row_count: Callable[[Array], Array] = struct.field(pytree_node=False)
    example: Callable[[Array, Array], Batch] = struct.field(pytree_node=False)

    @property
    def device_bytes(self) -> int:
        """Bytes that the examples take on a device: none."""
        return 0

    def rows(self, client_id: Array) -> Array:
        """Number of a client's rows, int32."""
        return self.row_count(client_id).astype(jnp.int32)

    def gather(self, client_id: Array, indices: Array) -> Batch:
        """Makes the rows ``indices`` of a client, int32 ``[rows]`` from 0 on."""
        return jax.vmap(self.example, in_axes=(None, 0))(client_id, indices)
