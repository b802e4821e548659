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

from fedqsn_jax.core.keys import keyed_permutation
from fedqsn_jax.core.types import Array, Key

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
      refills: Places that may be refilled after a step: about as many as become free by then. A
        place that comes too late waits for the next step. 0: all of them.
      steps: The number of steps that every client takes, if it is the same for all (those without
        rows left out); otherwise 0.
      mesh: Devices that share the cohort, with the one axis `CLIENTS_AXIS`; None: no more than one.
    """

    chunk_size: int = 1
    refills: int = 0
    steps: int = 0
    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """Number of devices that share a cohort."""
        return 1 if self.mesh is None else self.mesh.size


ONE_BY_ONE = ClientAxis()
"""One client after the other, on one device."""


class ClientWork(NamedTuple):
    """What is done for each client of a cohort, cut at its local steps.

    Pure functions of one client, which is named by its position in the cohort, int32 scalar. The
    context is a pytree with everything else that they need.

    Attributes:
      start: ``(context, client) -> carry``.
      step: ``(context, client, index, carry) -> carry``, for index 0, 1, ... up to the client's
        number of steps. Calls beyond that are without effect.
      finish: ``(context, client, carry) -> (contribution, kept)``: a pytree of arrays that adds up,
        and one that stays the client's own; ``()`` if nothing does.
    """

    start: Callable[[Any, Array], Any]
    step: Callable[[Any, Array, Array, Any], Any]
    finish: Callable[[Any, Array, Any], tuple[Any, Any]]


def sum_over_clients(
    work: ClientWork, context: Any, steps: Array, axis: ClientAxis
) -> tuple[Any, Any]:
    """Sums the contributions of a cohort without stacking them.

    Args:
      work: What is done for each client.
      context: What it is done with; the same for all.
      steps: int32 ``[cohort]``, the clients' numbers of steps. Clients without steps are left out.
      axis: How the clients are run.

    Returns:
      The sum, in the structure of one contribution; and what the clients keep, each leaf
      ``[cohort, ...]``, zeros for clients without steps.
    """
    # The longest first: later ones fill the places that become free.
    order = jnp.argsort(-steps).astype(jnp.int32)
    if axis.mesh is None:
        return _sum_on_device(work, context, steps, order, axis=axis)
    # Device d gets every n-th client, so that all get long and short ones; a place of -1 is empty.
    share = -(-steps.shape[0] // axis.devices)
    padding = share * axis.devices - steps.shape[0]
    dealt = jnp.pad(order, (0, padding), constant_values=-1)
    dealt = dealt.reshape(share, axis.devices).T.reshape(-1)

    def on_each_device(context: Any, steps: Array, dealt: Array) -> tuple[Any, Any]:
        # What is kept is zero but on one device: its sum is exact.
        return jax.lax.psum(_sum_on_device(work, context, steps, dealt, axis=axis), CLIENTS_AXIS)

    everywhere, shared = PartitionSpec(), PartitionSpec(CLIENTS_AXIS)
    return jax.shard_map(
        on_each_device,
        mesh=axis.mesh,
        in_specs=(everywhere, everywhere, shared),
        out_specs=everywhere,
        check_vma=False,
    )(context, steps, dealt)


def _sum_on_device(
    work: ClientWork, context: Any, steps: Array, order: Array, *, axis: ClientAxis
) -> tuple[Any, Any]:
    """Sums over the clients in ``order``, those without steps last; -1 is no client."""
    counts = jnp.where(order >= 0, steps[order], 0)
    shapes, kept_shapes = jax.eval_shape(
        lambda context, client: work.finish(context, client, work.start(context, client)),
        context,
        order[0],
    )
    zero = (
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        jax.tree.map(lambda leaf: jnp.zeros((*steps.shape, *leaf.shape), leaf.dtype), kept_shapes),
    )
    queue = _Queue(order=order, counts=counts, clients=jnp.sum(counts > 0, dtype=jnp.int32))
    if axis.chunk_size == 1:
        return _one_by_one(work, context, queue, zero)
    places = _Places(work=work, context=context, queue=queue, axis=axis)
    return places.run(*zero)


class _Queue(NamedTuple):
    """The clients of a device, in the order in which they are trained.

    Attributes:
      order: int32 ``[n]``: their positions in the cohort; -1 is no client.
      counts: int32 ``[n]``: their numbers of steps; those without are last.
      clients: int32 scalar: how many have steps.
    """

    order: Array
    counts: Array
    clients: Array


def _one_by_one(work: ClientWork, context: Any, queue: _Queue, zero: Any) -> tuple[Any, Any]:
    def one(position: Array, results: tuple[Any, Any]) -> tuple[Any, Any]:
        (total, kept), client = results, queue.order[position]
        carry = jax.lax.fori_loop(
            0,
            queue.counts[position],
            lambda index, carry: work.step(context, client, index, carry),
            work.start(context, client),
        )
        contribution, own = work.finish(context, client, carry)
        return (
            jax.tree.map(jnp.add, total, contribution),
            jax.tree.map(lambda all, leaf: all.at[client].set(leaf), kept, own),
        )

    return jax.lax.fori_loop(0, queue.clients, one, zero)


class _Chunk(NamedTuple):
    """Clients side by side.

    Attributes:
      position: int32 ``[chunk]``: which client of the order stands in each place; places whose
        position is beyond the last client are empty.
      steps_done: int32 ``[chunk]``: how many steps it has done.
      carry: Its state, each leaf ``[chunk, ...]``.
      following: int32 scalar: the position of the next client to take a place.
      total: The sum of the contributions of those that are done.
      kept: What they keep, each leaf ``[cohort, ...]``.
    """

    position: Array
    steps_done: Array
    carry: Any
    following: Array
    total: Any
    kept: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Places:
    """Places in which clients train side by side, and what happens to them."""

    work: ClientWork
    context: Any
    queue: _Queue
    axis: ClientAxis

    @property
    def size(self) -> int:
        return min(self.axis.chunk_size, self.queue.order.shape[0])

    @property
    def refills(self) -> int:
        return self.size if self.axis.steps else min(self.axis.refills or self.size, self.size)

    def run(self, total: Any, kept: Any) -> tuple[Any, Any]:
        """Trains all clients; the arguments are zeros in the structure of the results."""

        def turn(chunk: _Chunk) -> _Chunk:
            # With a number of steps that is known beforehand the device need not ask the host.
            steps = self.axis.steps or 1
            chunk = jax.lax.fori_loop(0, steps, lambda _, chunk: self._one_step(chunk), chunk)
            return self._refill(chunk)

        position = jnp.arange(self.size, dtype=jnp.int32)
        first = _Chunk(
            position=position,
            steps_done=jnp.zeros_like(position),
            carry=self._start(position),
            following=jnp.int32(self.size),
            total=total,
            kept=kept,
        )
        end = jax.lax.while_loop(
            lambda chunk: (chunk.position < self.queue.clients).any(), turn, first
        )
        return end.total, end.kept

    def _start(self, position: Array) -> Any:
        start = jax.vmap(self.work.start, in_axes=(None, 0))
        return start(self.context, self._client_in(position))

    def _client_in(self, position: Array) -> Array:
        # An empty place stands for some client; nothing that it does is used.
        last = self.queue.order.shape[0] - 1
        return jnp.maximum(self.queue.order[jnp.minimum(position, last)], 0)

    def _steps_left(self, chunk: _Chunk) -> Array:
        last = self.queue.order.shape[0] - 1
        left = self.queue.counts[jnp.minimum(chunk.position, last)] - chunk.steps_done
        return jnp.where(chunk.position < self.queue.clients, left, 0)

    def _one_step(self, chunk: _Chunk) -> _Chunk:
        active = self._steps_left(chunk) > 0
        step = jax.vmap(self.work.step, in_axes=(None, 0, 0, 0))
        clients = self._client_in(chunk.position)
        carry = step(self.context, clients, chunk.steps_done, chunk.carry)
        carry = jax.tree.map(
            lambda new, old: jnp.where(_along(active, old), new, old), carry, chunk.carry
        )
        return chunk._replace(carry=carry, steps_done=chunk.steps_done + active)

    def _refill(self, chunk: _Chunk) -> _Chunk:
        """Counts in those that are done, and gives their places to others."""
        done = (chunk.position < self.queue.clients) & (self._steps_left(chunk) == 0)
        # Of the places that are done the first few; behind them, ones that are not.
        place = jnp.argsort(~done)[: self.refills].astype(jnp.int32)
        served = done[place]
        carry = jax.tree.map(lambda leaf: leaf[place], chunk.carry)
        ended = self._client_in(chunk.position[place])
        finish = jax.vmap(self.work.finish, in_axes=(None, 0, 0))
        contributions, own = finish(self.context, ended, carry)
        beyond = jnp.arange(self.refills, dtype=jnp.int32)
        owner = jnp.where(served, ended, self.queue.order.shape[0] * self.axis.devices + beyond)
        kept = jax.tree.map(
            lambda all, each: all.at[owner].set(each, mode="drop", unique_indices=True),
            chunk.kept,
            own,
        )
        position = chunk.following + beyond
        # A place that is not served keeps what it has: an index beyond the chunk is dropped.
        target = jnp.where(served, place, self.size + beyond)

        def put(old: Array, new: Array) -> Array:
            return old.at[target].set(new, mode="drop", unique_indices=True)

        return _Chunk(
            position=put(chunk.position, position),
            steps_done=put(chunk.steps_done, jnp.zeros_like(position)),
            carry=jax.tree.map(put, chunk.carry, self._start(position)),
            following=chunk.following + served.sum(dtype=jnp.int32),
            total=jax.tree.map(
                lambda total, each: _add(total, each, served), chunk.total, contributions
            ),
            kept=kept,
        )


def _add(total: Array, each: Array, served: Array) -> Array:
    """Adds the contributions ``[refills, ...]`` of the places that are served."""
    each = jnp.where(_along(served, each), each, 0)
    # The compiler's loop over a short axis waits for every load; in one expression they overlap.
    for one in each[:_UNROLLED]:
        total += one
    rest = each[_UNROLLED:]
    return total + rest.sum(axis=0, dtype=rest.dtype) if len(rest) else total


_UNROLLED = 16
"""Contributions of a chunk that are added in one expression."""


def _along(flags: Array, leaf: Array) -> Array:
    """Flags ``[chunk]``, in a shape that broadcasts against ``[chunk, ...]``."""
    return flags.reshape(-1, *[1] * (leaf.ndim - 1))
