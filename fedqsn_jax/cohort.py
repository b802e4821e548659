"""Who takes part in a round, and how the client axis is run.

What a client does depends on its id alone, never on its place in the cohort. So the strategies
below differ in speed and in the order of additions only:

- one client after the other, each with its own number of steps (``scan``);
- several side by side by ``vmap`` (``vmap``): a chunk of places, in which clients stand until they
  have done their own number of steps. Then the next of the cohort takes the place, the longest
  first, so that no place waits for the chunk's longest client;
- either of them on every device of a mesh, each with its share of the cohort (``mesh``).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fedqsn_jax.randomness import keyed_permutation
from fedqsn_jax.types import Array, Key

CLIENTS_AXIS = "clients"
"""The name of the mesh axis over which a cohort is shared out."""


def sample_cohort(key: Key, population: int, size: int) -> Array:
    """Draws distinct client ids without replacement, uniformly; int32 ``[size]``.

    Costs operations in proportion to ``size``, not to the population.

    Raises:
      ValueError: The cohort is empty or larger than the population.
    """
    if not 1 <= size <= population:
        raise ValueError(f"cohort of {size} clients: allowed are 1 to the population, {population}")
    return keyed_permutation(key, jnp.arange(size, dtype=jnp.int32), population)


@dataclasses.dataclass(frozen=True)
class ClientAxis:
    """How clients are run: static.

    Attributes:
      chunk_size: Clients that are trained at once on a device; with 1, one after the other.
      mesh: Devices that share the cohort, with the one axis `CLIENTS_AXIS`; None: no more than one.
    """

    chunk_size: int = 1
    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """Number of devices that share a cohort."""
        return 1 if self.mesh is None else self.mesh.size


class ClientWork(NamedTuple):
    """What is done for each client of a cohort, cut at its local steps.

    Pure functions of one client, which is named by its position in the cohort, int32 scalar. The
    context is a pytree with everything else that they need.

    Attributes:
      start: ``(context, client) -> carry``.
      step: ``(context, client, index, carry) -> carry``, for index 0, 1, ... up to the client's
        number of steps. Calls beyond that are without effect.
      finish: ``(context, client, carry) -> contribution``, a pytree of arrays that adds up.
    """

    start: Callable[[Any, Array], Any]
    step: Callable[[Any, Array, Array, Any], Any]
    finish: Callable[[Any, Array, Any], Any]


def sum_over_clients(work: ClientWork, context: Any, steps: Array, axis: ClientAxis) -> Any:
    """Sums the contributions of a cohort without stacking them.

    Args:
      work: What is done for each client.
      context: What it is done with; the same for all.
      steps: int32 ``[cohort]``, the clients' numbers of steps. Clients without steps are left out.
      axis: How the clients are run.

    Returns:
      The sum, in the structure of one contribution.
    """
    # The longest first: later ones fill the places that become free.
    order = jnp.argsort(-steps).astype(jnp.int32)
    if axis.mesh is None:
        return _sum_on_device(work, context, steps, order, axis.chunk_size)
    # Device d gets every n-th client, so that all get long and short ones; a place of -1 is empty.
    share = -(-steps.shape[0] // axis.devices)
    padding = share * axis.devices - steps.shape[0]
    dealt = jnp.pad(order, (0, padding), constant_values=-1)
    dealt = dealt.reshape(share, axis.devices).T.reshape(-1)

    def on_each_device(context: Any, steps: Array, dealt: Array) -> Any:
        own = _sum_on_device(work, context, steps, dealt, min(axis.chunk_size, share))
        return jax.lax.psum(own, CLIENTS_AXIS)

    everywhere, shared = PartitionSpec(), PartitionSpec(CLIENTS_AXIS)
    return jax.shard_map(
        on_each_device,
        mesh=axis.mesh,
        in_specs=(everywhere, everywhere, shared),
        out_specs=everywhere,
        check_vma=False,
    )(context, steps, dealt)


def _sum_on_device(
    work: ClientWork, context: Any, steps: Array, order: Array, chunk_size: int
) -> Any:
    """Sums over the clients in ``order``, those without steps last; -1 is no client."""
    counts = jnp.where(order >= 0, steps[order], 0)
    clients = jnp.sum(counts > 0, dtype=jnp.int32)
    shapes = jax.eval_shape(
        lambda context, client: work.finish(context, client, work.start(context, client)),
        context,
        order[0],
    )
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if chunk_size == 1:
        return _one_by_one(work, context, order, counts, clients, zero)
    return _side_by_side(work, context, order, counts, clients, zero, chunk_size)


def _one_by_one(
    work: ClientWork, context: Any, order: Array, counts: Array, clients: Array, zero: Any
) -> Any:
    def one(position: Array, total: Any) -> Any:
        client = order[position]
        carry = jax.lax.fori_loop(
            0,
            counts[position],
            lambda index, carry: work.step(context, client, index, carry),
            work.start(context, client),
        )
        return jax.tree.map(jnp.add, total, work.finish(context, client, carry))

    return jax.lax.fori_loop(0, clients, one, zero)


class _Chunk(NamedTuple):
    """Clients side by side.

    Attributes:
      position: int32 ``[chunk]``: which client of the order stands in each place; places whose
        position is beyond the last client are empty.
      steps_done: int32 ``[chunk]``: how many steps it has done.
      carry: Its state, each leaf ``[chunk, ...]``.
      following: int32 scalar: the position of the next client to take a place.
      total: The sum of the contributions of those that are done.
    """

    position: Array
    steps_done: Array
    carry: Any
    following: Array
    total: Any


def _side_by_side(
    work: ClientWork,
    context: Any,
    order: Array,
    counts: Array,
    clients: Array,
    zero: Any,
    chunk_size: int,
) -> Any:
    last = order.shape[0] - 1
    start = jax.vmap(work.start, in_axes=(None, 0))
    step = jax.vmap(work.step, in_axes=(None, 0, 0, 0))
    finish = jax.vmap(work.finish, in_axes=(None, 0, 0))

    def client_in(position: Array) -> Array:
        # An empty place goes on with some client's rows; nothing of that is used.
        return jnp.maximum(order[jnp.minimum(position, last)], 0)

    def turn(chunk: _Chunk) -> _Chunk:
        """Steps until a client is done, then fills the places that became free."""
        client, taken = client_in(chunk.position), chunk.position < clients
        left = counts[jnp.minimum(chunk.position, last)] - chunk.steps_done
        count = jnp.where(taken, left, jnp.iinfo(jnp.int32).max).min()
        carry = jax.lax.fori_loop(
            0,
            count,
            lambda offset, carry: step(context, client, chunk.steps_done + offset, carry),
            chunk.carry,
        )
        done = taken & (left == count)

        def add(total: Array, each: Array) -> Array:
            return total + jnp.where(_along(done, each), each, 0).sum(axis=0, dtype=each.dtype)

        total = jax.tree.map(add, chunk.total, finish(context, client, carry))
        position = jnp.where(
            done, chunk.following + jnp.cumsum(done, dtype=jnp.int32) - 1, chunk.position
        )
        carry = jax.tree.map(
            lambda new, old: jnp.where(_along(done, old), new, old),
            start(context, client_in(position)),
            carry,
        )
        steps_done = jnp.where(done, 0, chunk.steps_done + count)
        following = chunk.following + done.sum(dtype=jnp.int32)
        return _Chunk(position, steps_done, carry, following, total)

    position = jnp.arange(chunk_size, dtype=jnp.int32)
    first = _Chunk(
        position,
        jnp.zeros_like(position),
        start(context, client_in(position)),
        jnp.int32(chunk_size),
        zero,
    )
    return jax.lax.while_loop(lambda chunk: (chunk.position < clients).any(), turn, first).total


def _along(flags: Array, leaf: Array) -> Array:
    """Flags ``[chunk]``, in a shape that broadcasts against ``[chunk, ...]``."""
    return flags.reshape(-1, *[1] * (leaf.ndim - 1))
