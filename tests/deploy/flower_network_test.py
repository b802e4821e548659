"""What the server makes of Flower's grid: names of nodes, and replies that are slow to come."""

import base64
import hashlib
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="Flower's programs need the extra: pip install '.[deploy]'")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedqsn_jax.deploy import flower_network, messages
from fedqsn_jax.deploy.flower_network import FlowerNetwork
from fedqsn_jax.deploy.network import Outgoing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What Flower's programs set; and no long waits."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(flower_network, "_SLOW", 0.2)


class Grid:
    """Nodes ``node:N`` that answer by calls: of each message's name, what a look for it gives."""

    def __init__(self, *looks):
        self._looks = looks
        self.sent = []

    def get_nodes(self):
        return [
            SimpleNamespace(node_id=number, public_key=b"") for number in range(len(self._looks))
        ]

    def push_messages(self, given):
        [message] = given
        message.metadata.__dict__["_message_id"] = str(message.metadata.dst_node_id)
        self.sent.append(message)
        return [message.metadata.message_id]

    def pull_messages(self, names):
        [name] = names
        found = self._looks[int(name)]()
        if found is None:
            return []
        asked = next(m for m in self.sent if m.metadata.message_id == name)
        return [Message(messages.answer(found, {}), reply_to=asked)]


def replies(grid, timeout=5.0):
    """Who has answered, and after how long."""
    network = FlowerNetwork(grid)
    due = [Outgoing(node, b"", {}) for node in network.nodes()]
    began = time.monotonic()
    found = list(network.exchange(lambda: due.pop(0) if due else None, timeout))
    return [(reply.node, reply.payload) for reply in found], time.monotonic() - began


def test_a_reply_that_is_being_uploaded_keeps_no_other_back():
    ended = threading.Event()

    def uploading():
        ended.wait(20)
        return b"slow"

    def last():
        # The others have been taken: now the upload ends.
        ended.set()
        return b"last"

    found, seconds = replies(Grid(uploading, lambda: b"quick", last), timeout=10)
    assert found[:2] == [("node:1", b"quick"), ("node:2", b"last")]
    assert found[2:] == [("node:0", b"slow")]
    assert seconds < 8


def test_a_round_ends_in_time_with_what_has_come():
    looks = iter([None, None])

    def late():
        # It has come when the time is up, as others were folded in.
        return next(looks, b"late")

    never = threading.Event()
    found, seconds = replies(Grid(lambda: None, late, lambda: never.wait(30) or None), 0.5)
    never.set()
    assert found == [("node:1", b"late")]
    assert seconds < 5


def test_what_flower_cannot_do_is_not_passed_over():
    def failing():
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        replies(Grid(failing))


def test_nodes_are_named_by_the_fingerprints_of_their_keys():
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    class Nodes:
        def get_nodes(self):
            return [
                SimpleNamespace(node_id=1, public_key=pem),
                SimpleNamespace(node_id=2, public_key=b"\x01\x02"),
                SimpleNamespace(node_id=3, public_key=b""),
            ]

    # RFC 5656: lengths and texts, then the point.
    point = key.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    parts = (b"ecdsa-sha2-nistp384", b"nistp384", point)
    blob = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    assert FlowerNetwork(Nodes()).nodes() == sorted([f"SHA256:{digest}", "key:0102", "node:3"])
