"""The server's part in a round: a payload for each client, and the updates folded in as they come.

These are the simulation's functions, called one client at a time: what is sent is encoded when it
is asked for, and what returns is added up and forgotten, so that memory does not grow with the
number of clients in a round.
"""

import dataclasses
import hashlib
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.core.trees import select
from fedqsn_jax.core.types import Columns, Key, Params
from fedqsn_jax.deploy.kept import NAME_SIZE
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import Proxy, dequantize_params, dequantize_proxy, whole_proxy
from fedqsn_jax.protocol.wire import decode_update, encode_proxy
from fedqsn_jax.rounds.aggregation import Contribution
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.rounds.views import received_columns, update_attacker

Rejection = str
"""Why an answer was not counted, in words for a log; it names no value of the model."""


def system_key() -> Key:
    """Returns a key of the operating system's entropy: 64 bits, all that JAX's generator takes.

    A seed of 32 bits can be found from one payload's bitmap in some days of one core, and with it
    every mask.
    """
    words = np.frombuffer(secrets.token_bytes(8), np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


@dataclasses.dataclass
class Round:
    """One round as it goes on; it is made by `open_round` and ended by `close`.

    Attributes:
      number: The round's number, from 0 on.
      sent: By client the token and the columns of what it was sent.
      total: The sum of the contributions so far, or None.
      losses: Sums of training losses, weighted by rows, and of rows.
      answered: Clients whose update was counted.
      rejected: By client why its answer was not, or why there was none.
      reached: Clients whose answers show that they have what they were sent.
      lost: Clients that had lost what they were sent in an earlier round.
    """

    number: int
    method: Method
    layout: Layout
    state: ServerState
    prepared: Proxy
    sent: dict[int, tuple[bytes, Columns]] = dataclasses.field(default_factory=dict)
    total: Contribution | None = None
    losses: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    answered: list[int] = dataclasses.field(default_factory=list)
    rejected: dict[int, Rejection] = dataclasses.field(default_factory=dict)
    reached: set[int] = dataclasses.field(default_factory=set)
    lost: set[int] = dataclasses.field(default_factory=set)

    @property
    def keeps(self) -> bool:
        """Whether a client's payload is the same in all rounds, so that it is sent once."""
        broadcast = self.method.broadcast
        return broadcast.is_one_way and not broadcast.renewed

    def payload(self, client: int) -> tuple[bytes, bytes]:
        """Returns what a client is sent in this round, and the token that its answer must carry.

        The payload is empty where the client has it from an earlier round. The token is of the
        system's entropy: an answer to another round, or another client's, does not have it.
        """
        proxy = self.method.proxy_of(
            client,
            self.prepared,
            secret_key=self.state.secret_key,
            round_index=self.state.round,
            transform_state=self.state.transform_state,
        )
        token = secrets.token_bytes(16)
        self.sent[client] = (token, jax.device_get(proxy.visible))
        return b"" if self._holds(client) else encode_proxy(proxy), token

    def payload_name(self, client: int) -> bytes:
        """Returns the name under which a client keeps its payload: the same in all rounds."""
        key = jax.random.key_data(fold_in_name(self.state.public_key, "payloads"))
        text = np.asarray(key).tobytes() + client.to_bytes(8, "little")
        return hashlib.blake2b(text, digest_size=NAME_SIZE).digest()

    def lose(self, client: int) -> Rejection | None:
        """Notes that a client has not got its payload any more: `payload` gives it again.

        Returns:
          Why that cannot be, or None.
        """
        if not self._holds(client):
            reason = "it says that it has lost what it was sent in this round"
            self.rejected[client] = reason
            return reason
        self.lost.add(client)
        return None

    def _holds(self, client: int) -> bool:
        received = self.state.broadcast.received
        if not self.keeps or received is None or client in self.lost:
            return False
        return bool(received[client])

    def training_key(self, client: int) -> list[int]:
        """Returns the words of the key of a client's batches and dropout in this round."""
        key = jax.random.fold_in(self.state.public_key, self.state.round)
        return [int(word) for word in jax.random.key_data(jax.random.fold_in(key, client))]

    def accept(
        self, client: int, token: bytes, payload: bytes, examples: int, loss: float
    ) -> Rejection | None:
        """Folds a client's answer in.

        Args:
          client: Who answers.
          token: What came with its payload.
          payload: Its update's bytes.
          examples: Number of its rows, as it says.
          loss: Its training loss, as it says.

        Returns:
          Why it was not counted, or None.
        """
        reason = self._fold(client, token, payload, examples, loss)
        if reason is not None:
            self.rejected[client] = reason
        return reason

    def _fold(
        self, client: int, token: bytes, payload: bytes, examples: int, loss: float
    ) -> Rejection | None:
        if client in self.answered:
            return "a second answer to the same round"
        if client not in self.sent or not secrets.compare_digest(self.sent[client][0], token):
            return "an answer to another round, or to another client's payload"
        self.reached.add(client)
        if not 0 < examples < 2**31:
            return "a number of rows that cannot be"
        try:
            delta, visible = decode_update(payload, self.layout)
        except ValueError as error:
            return f"its update cannot be read: {error}"
        received = self.sent[client][1]
        if any(not np.array_equal(mask, received[path]) for path, mask in visible.items()):
            return "an update of other columns than it was sent"
        part = _contribute(self.method, delta, jnp.int32(examples), received)
        if int(part.rejected):
            return "an update that is not finite"
        self.total = part if self.total is None else _add(self.total, part)
        self.answered.append(client)
        if np.isfinite(loss):
            self.losses.append((float(loss) * examples, examples))
        return None

    def close(self) -> tuple[ServerState, dict[str, Any]]:
        """Ends the round: the state after it, and what it tells.

        Without a single update that counted the model stays as it is. In one-way rounds there are
        the counts of all rounds' payloads too, see `Broadcast.send`.
        """
        ids = sorted(self.sent)
        visible = {
            path: jnp.asarray(np.stack([self.sent[client][1][path] for client in ids]))
            for path in (self.sent[ids[0]][1] if ids else {})
        }
        total = self.total
        if total is None:
            total = _nothing(self.method, self.state.params, self.prepared)
        ended, payloads = self._count_payloads(jnp.asarray(ids, jnp.int32), visible)
        state = _close(self.method, ended, total, self.prepared, jnp.asarray(ids), visible)
        rows = sum(count for _, count in self.losses)
        facts: dict[str, Any] = {
            "clients/returned": len(self.answered),
            "clients/rejected": len(self.rejected),
            **payloads,
        }
        if rows:
            facts["train/loss"] = sum(loss for loss, _ in self.losses) / rows
        return state, facts

    def _count_payloads(self, ids: Any, visible: Columns) -> tuple[ServerState, dict[str, Any]]:
        """The state that knows who has been sent what, and the counts."""
        broadcast = self.state.broadcast
        lost = jnp.asarray([int(client) in self.lost for client in ids], bool)
        counted, facts = self.method.broadcast.send(broadcast, ids, visible, lost=lost)
        if broadcast.received is not None:
            # Who has not answered may have nothing, and is sent it again.
            reached = jnp.asarray([int(client) in self.reached for client in ids], bool)
            received = broadcast.received.at[ids].max(reached)
            counted = dataclasses.replace(counted, received=received)
        return dataclasses.replace(self.state, broadcast=counted), facts


def open_round(method: Method, layout: Layout, state: ServerState) -> Round:
    """Begins the round after those that a state has finished: quantizes the model, once for all."""
    prepared = _prepare(method, state)
    return Round(int(state.round), method, layout, state, prepared)


def _prepare(method: Method, state: ServerState) -> Proxy:
    model = method.broadcast.sent(state.broadcast, state.params)
    whole = whole_proxy(select(model, method.roles.sent), method.sites)
    return method.transform.prepare(state.transform_state, whole)


def _contribute(method: Method, delta: Params, examples: Any, visible: Columns) -> Contribution:
    values = dequantize_params(delta, method.sites)
    return method.aggregator.contribute(values, method.aggregator.weigh(examples), visible)


def _add(left: Contribution, right: Contribution) -> Contribution:
    return jax.tree.map(jnp.add, left, right)


def _nothing(method: Method, params: Params, prepared: Proxy) -> Contribution:
    delta = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.float32), select(params, method.roles.returned)
    )
    return method.aggregator.contribute(delta, jnp.float32(0), prepared.visible)


def _close(
    method: Method,
    state: ServerState,
    total: Contribution,
    prepared: Proxy,
    ids: Any,
    visible: Columns,
) -> ServerState:
    values = dequantize_proxy(prepared)
    params, optimizer_state = method.aggregator.finish(
        method.broadcast.start_of_step(state.broadcast, state.params),
        state.optimizer_state,
        total,
        server_visible=values.visible,
        sent=values.params,
    )
    attackers = {
        name: update_attacker(
            attacker, received_columns(attacker, ids, visible), values, method.sites
        )
        for name, attacker in state.attackers.items()
    }
    return dataclasses.replace(
        state,
        params=params,
        optimizer_state=optimizer_state,
        attackers=attackers,
        round=state.round + 1,
        broadcast=method.broadcast.after_round(state.broadcast, params, state.round + 1),
    )
