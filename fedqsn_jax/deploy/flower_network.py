"""Flower's grid as a `network.Network`."""

import base64
import functools
import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cryptography.hazmat.primitives import serialization
from flwr.app import Message
from flwr.serverapp import Grid

from fedqsn_jax.deploy import messages
from fedqsn_jax.deploy.network import Outgoing, Reply

_PAUSE = 0.05
"""Seconds after a look that has found nothing; each look is for one reply."""

_SLOW = 5.0
"""Seconds after which the next look does not wait for one that goes on: a reply is being uploaded,
and others may be there. Till then there is one at a time, so that one update is held in memory."""

_AT_ONCE = 4
"""The most looks at once."""


class FlowerNetwork:
    """The nodes of a SuperLink."""

    def __init__(self, grid: Grid) -> None:
        """Takes the grid; node ids become names by the key that a node is registered with."""
        self._grid = grid
        self._ids: dict[str, int] = {}

    def nodes(self) -> list[str]:
        """Names of the nodes that are there: of public keys, or of ids where nodes have none.

        A key is named as ``ssh-keygen -lf KEY.pub`` does.
        """
        self._ids = {
            _name_of_key(node.public_key) if node.public_key else f"node:{node.node_id}": (
                node.node_id
            )
            for node in self._grid.get_nodes()
        }
        return sorted(self._ids)

    def exchange(self, outgoing: Callable[[], Outgoing | None], timeout: float) -> Iterator[Reply]:
        """Sends one message after the other, and takes one reply after the other.

        So the server's program holds one payload or one update at a time.
        """
        waiting: dict[str, str] = {}
        deadline, looks = None, _Looks(self._grid)
        late: set[str] | None = None
        while True:
            while late is None and (message := outgoing()) is not None:
                ttl = timeout if deadline is None else max(deadline - time.monotonic(), 1.0)
                waiting[self._push(message, ttl)] = message.node
            deadline = deadline or time.monotonic() + timeout
            if late is None and time.monotonic() > deadline:
                # What has come while others were folded in is taken still.
                late = set(waiting)
            names = [name for name in waiting if late is None or name in late]
            if not names:
                return
            name, found = looks.look(names)
            if late is not None:
                late = late - {name} if name else set()
            for reply in found:
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield _reply(node, reply)

    def _push(self, message: Outgoing, ttl: float) -> str:
        """Sends a message; returns its name."""
        content = messages.task(message.payload, message.settings)
        node = self._ids[message.node]
        [name] = self._grid.push_messages(
            [Message(content, dst_node_id=node, message_type="train", ttl=ttl)]
        )
        return name


@functools.cache
def _name_of_key(key: bytes) -> str:
    try:
        public = serialization.load_pem_public_key(key)
    except ValueError:
        return f"key:{key.hex()}"
    text = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(text.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


class _Looks:
    """Looks for replies by their messages' names, in turn."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._turn: deque[str] = deque()
        self._going_on: set[str] = set()
        self._ended: queue.Queue[tuple[str, list[Message] | Exception]] = queue.Queue()

    def look(self, names: Sequence[str]) -> tuple[str, list[Message]]:
        """Looks for one reply; returns its message's name and what there was.

        The name is empty where looks that go on have not ended for some time.
        """
        self._turn = deque(name for name in self._turn if name in names)
        self._turn.extend(name for name in names if name not in self._turn)
        free = [name for name in self._turn if name not in self._going_on]
        if free and len(self._going_on) < _AT_ONCE:
            self._start(free[0])
        try:
            name, found = self._ended.get(timeout=_SLOW)
        except queue.Empty:
            return "", []
        self._going_on.discard(name)
        if isinstance(found, Exception):
            raise found
        if not found:
            time.sleep(_PAUSE)
        return name, found

    def _start(self, name: str) -> None:
        self._turn.remove(name)
        self._turn.append(name)
        self._going_on.add(name)

        def look() -> None:
            try:
                found: list[Message] | Exception = list(self._grid.pull_messages([name]))
            except Exception as error:
                found = error
            self._ended.put((name, found))

        threading.Thread(target=look, daemon=True).start()


_FAILURES = {
    3: "did not answer in time",
    4: "did not answer in time",
    5: "its node is gone",
    8: "its program died",
}
"""What Flower's error codes mean; all others: the program failed."""


def _reply(node: str, message: Message) -> Reply:
    if message.has_error():
        # Its reason may be the text of an exception of the client's: only the code is told.
        code = message.error.code
        return Reply(node, failure=f"{_FAILURES.get(code, 'its program failed')} (code {code})")
    if messages.is_lost(message):
        return Reply(node, lost=True)
    try:
        read = messages.read_answer(message)
    except ValueError as error:
        return Reply(node, failure=str(error))
    if isinstance(read, str):
        return Reply(node, failure=f"it says that it cannot take part: {read}")
    payload, settings = read
    return Reply(node, payload, settings)
