"""A deployment in memory: the server's run, with clients that are functions."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import Config, resolve
from fedqsn_jax.deploy.client import Answer, check_rows, make_client
from fedqsn_jax.deploy.kept import answer_with
from fedqsn_jax.deploy.network import Outgoing, Reply
from fedqsn_jax.deploy.plan import Plan

CLIENTS, FEATURES, CLASSES = 3, 6, 3


def rows(count: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of a task that a linear model can do."""
    random = np.random.default_rng(seed)
    image = random.normal(size=(count, FEATURES)).astype(np.float32)
    truth = np.random.default_rng(99).normal(size=(FEATURES, CLASSES))
    return {"image": image, "label": (image @ truth).argmax(1).astype(np.int32)}


PRIVATE, TEST = rows(20, 0), rows(40, 1)
CLIENT_ROWS = [rows(count, 10 + count) for count in (9, 14, 5)]


def configured(**sections: Any) -> Config:
    """A small run, with other values where given."""
    values: dict[str, Any] = {
        "rounds": 3,
        "rounds_per_call": 1,
        "data": {"clients": CLIENTS},
        "model": {"hidden": (10, 8)},
        "pretraining": {"steps": 5, "batch_size": 8},
        "client": {"steps": 4, "batch_size": 4},
        "cohort": {"size": CLIENTS},
        "evaluation": {"attackers": (1,), "proxy_samples": 2},
        "p1": 0.3,
        "p2": 0.3,
        "block_size": 4,
    }
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return resolve(values)


class MemoryKept:
    """What a client keeps, in memory; a stand-in for a file."""

    def __init__(self) -> None:
        self._payload: bytes | None = None

    def read(self) -> bytes | None:
        return self._payload

    def write(self, payload: bytes) -> None:
        self._payload = payload


class MemoryNetwork:
    """Clients in this process, named ``client N``.

    Attributes:
      received: Of each client all that it was sent: payload and settings.
      kept: What clients keep, by their names and payloads' names.
    """

    def __init__(
        self,
        change: Callable[[str, int, Reply], list[Reply]] | None = None,
        base: dict[str, Any] | None = None,
    ) -> None:
        """Takes what a network may do to a reply of a client in an exchange, from 1 on.

        ``base`` is what clients have of a public model.
        """
        self._base = base
        self._change = change or (lambda node, exchange, reply: [reply])
        self._exchanges = 0
        self._clients: dict[str, Any] = {}
        self.received: dict[str, list[tuple[bytes, dict[str, Any]]]] = {}
        self.kept: dict[tuple[str, bytes], MemoryKept] = {}

    def nodes(self) -> list[str]:
        return [f"client {number}" for number in range(CLIENTS)]

    def exchange(self, outgoing: Callable[[], Outgoing | None], timeout: float) -> Iterator[Reply]:
        del timeout
        self._exchanges += 1
        while (message := outgoing()) is not None:
            node, payload, settings = message
            self.received.setdefault(node, []).append((payload, settings))
            yield from self._change(node, self._exchanges, self.answer(node, payload, settings))

    def answer(self, node: str, payload: bytes, settings: dict[str, Any]) -> Reply:
        plan = Plan.decode(settings["plan"])
        client = self._clients.get(settings["plan"])
        if client is None:
            client = self._clients[settings["plan"]] = make_client(plan, self._base)
        own = check_rows(plan, CLIENT_ROWS[int(node.rsplit(" ", 1)[1])], node)
        key = jax.random.wrap_key_data(jnp.asarray(settings["key"], jnp.uint32))
        if "name" not in settings:
            return reply_of(node, client.answer(payload, key, own), settings["token"])
        kept = self.kept.setdefault((node, settings["name"]), MemoryKept())
        answer = answer_with(kept, client, payload, key, own)
        if answer is None:
            return Reply(node, lost=True)
        return reply_of(node, answer, settings["token"])


def reply_of(node: str, answer: Answer, token: bytes) -> Reply:
    told = {"token": token, "examples": answer.examples, "loss": answer.loss}
    return Reply(node, answer.payload, told)
