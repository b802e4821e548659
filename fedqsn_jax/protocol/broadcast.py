"""What of the server's model is sent: how often what was learned goes back, and how much of it.

The paper sends the latest model in every round. What was learned from some clients' rows so reaches
all others, and with it the benefit that an attacker is after. Here proxies can be made of an
earlier model instead:

- in every n-th round what was learned is sent, and clients start at it until the next time;
- a share of it is sent: with the first model ``W_0`` and the latest ``W_t`` clients start at
  ``W_0 + share (W_t - W_0)``;
- nothing is ever sent (*one-way rounds*): every proxy is made of ``W_0``. Then no byte that a
  client receives depends on another client's rows. Where a client's mask stays the same too, so
  does all that it receives: it is sent to each client once.

The deltas of the clients go to ``W_t`` whatever was sent.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import struct

from fedqsn_jax.core.trees import Selection, combine, select
from fedqsn_jax.core.types import Array, Columns, Params


@struct.dataclass
class BroadcastState:
    """What a broadcast keeps; what it does not need is None.

    Attributes:
      first: The returned tensors of the first model, ``W_0``.
      latest: The same of the model that was sent last.
      received: Who has received a payload, bool ``[population]``.
      payloads: How many payloads were sent so far; such a count is uint32 ``[2]``, the upper 32
        bits and the lower ones.
      columns: How many visible columns they had, a count a masked site.
    """

    first: Params | None = None
    latest: Params | None = None
    received: Array | None = None
    payloads: Array | None = None
    columns: dict[str, Array] | None = None


@dataclasses.dataclass(frozen=True)
class Broadcast:
    """When and how much of what was learned is sent; static.

    Example::

      one_way = Broadcast(every=0)
      state = one_way.init(params, None, population=20)
      one_way.sent(state, newer_params)  # params

    Attributes:
      every: What was learned is sent after every so many rounds; 1: after each; 0: never.
      share: How much of it is sent, above 0 to 1.
      renewed: Whether a client's mask changes from round to round, so that it needs a payload in
        each even where nothing that was learned is sent; may be traced.
    """

    every: int = 1
    share: float = 1.0
    renewed: bool | Array = True

    @property
    def is_one_way(self) -> bool:
        """Whether nothing that was learned is ever sent."""
        return self.every == 0

    def init(
        self, params: Params, returned: Selection, population: int, masked: Iterable[str] = ()
    ) -> BroadcastState:
        """Returns the state before the first round.

        Args:
          params: The hidden model.
          returned: The tensors that rounds change.
          population: Number of clients.
          masked: The names of the sites of which columns are hidden.
        """
        # Copies: the state's own leaves are donated.
        own = jax.tree.map(jnp.copy, select(params, returned))
        keeps_first = self.is_one_way or self.share != 1
        state = BroadcastState(
            first=own if keeps_first else None,
            latest=jax.tree.map(jnp.copy, own) if self.every > 1 else None,
        )
        if not self.is_one_way:
            return state
        return dataclasses.replace(
            state,
            received=jnp.zeros(population, bool),
            payloads=jnp.zeros(2, jnp.uint32),
            columns={path: jnp.zeros(2, jnp.uint32) for path in masked},
        )

    def sent(self, state: BroadcastState, params: Params) -> Params:
        """Returns the model that the next round's proxies are made of, in full precision.

        Args:
          state: The broadcast's.
          params: The hidden model.
        """
        if self.is_one_way:
            return combine(state.first, params)
        if self.every > 1:
            return combine(state.latest, params)
        return self._shared(state, params)

    def start_of_step(self, state: BroadcastState, params: Params) -> Params:
        """Returns the model that the server's step starts from: in one-way rounds the first one.

        Args:
          state: The broadcast's.
          params: The hidden model.
        """
        return self.sent(state, params) if self.is_one_way else params

    def after_round(self, state: BroadcastState, params: Params, finished: Array) -> BroadcastState:
        """Returns the state after a round.

        Args:
          state: The state before it.
          params: The hidden model after it.
          finished: Number of finished rounds, int32 scalar.
        """
        if self.every <= 1:
            return state
        due = finished % self.every == 0
        latest = jax.tree.map(
            lambda old, new: old if old is None else jnp.where(due, new, old),
            state.latest,
            self._shared(state, params),
            is_leaf=lambda leaf: leaf is None,
        )
        return dataclasses.replace(state, latest=latest)

    def send(
        self,
        state: BroadcastState,
        ids: Array,
        visible: Columns,
        lost: Array | bool = False,
        is_there: Array | None = None,
    ) -> tuple[BroadcastState, dict[str, Array]]:
        """Counts the payloads of a round's clients, but for those who have theirs already.

        Args:
          state: The broadcast's.
          ids: The cohort, int32 ``[cohort]``.
          visible: What each client sees, bool ``[cohort, layers, columns]`` a masked site.
          lost: Who has lost what it had received, bool ``[cohort]``.
          is_there: Which places of the cohort are taken, bool ``[cohort]``; None: all.

        Returns:
          The state after that; and in one-way rounds uint32 facts: ``clients/sent``, the payloads
          of this round, and the counts of all rounds so far (see `BroadcastState`), ``payloads``
          and ``visible/PATH``.
        """
        if state.received is None or state.payloads is None or state.columns is None:
            return state, {}
        due = ~state.received[ids] | self.renewed | lost
        if is_there is not None:
            due &= is_there
        sent = due.sum(dtype=jnp.uint32)
        columns = {
            path: _add(count, (visible[path] & due[:, None, None]).sum(dtype=jnp.uint32))
            for path, count in state.columns.items()
        }
        payloads = _add(state.payloads, sent)
        state = dataclasses.replace(
            state,
            received=state.received.at[ids].max(True if is_there is None else is_there),
            payloads=payloads,
            columns=columns,
        )
        facts = {f"visible/{path}": count for path, count in columns.items()}
        return state, {"clients/sent": sent, "payloads": payloads, **facts}

    def _shared(self, state: BroadcastState, params: Params) -> Params:
        """The first model with a share of what was learned since."""
        if self.share == 1:
            return params
        moved = jax.tree.map(
            lambda first, now: (
                None if first is None else (first + self.share * (now - first)).astype(now.dtype)
            ),
            state.first,
            params,
            is_leaf=lambda leaf: leaf is None,
        )
        return combine(moved, params)


def _add(count: Array, more: Array) -> Array:
    """Adds a uint32 scalar to a count."""
    low = count[1] + more
    return jnp.stack([count[0] + (low < more), low])


EVERY_ROUND = Broadcast()
"""What was learned is sent in each round, as the paper has it."""
