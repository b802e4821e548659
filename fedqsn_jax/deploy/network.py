"""What a server wants of a network: who is there, messages out and answers in.

Flower's is in `server_app`; tests have one in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol


class Outgoing(NamedTuple):
    """What goes to a node.

    Attributes:
      node: Its name in the network.
      payload: A proxy's bytes, or none.
      settings: What goes with it: ``plan``, ``token``, ``key``, and ``name`` where the client is to
        keep the payload.
    """

    node: str
    payload: bytes
    settings: dict[str, Any]


class Reply(NamedTuple):
    """What came back from a node.

    Attributes:
      node: Its name in the network.
      payload: An update's bytes.
      settings: What came with it: ``token``, ``examples``, ``loss``.
      failure: Why there is no payload, or empty.
      lost: Whether it says that it has not got the payload that it was to keep.
    """

    node: str
    payload: bytes = b""
    settings: Mapping[str, Any] = {}
    failure: str = ""
    lost: bool = False


class Network(Protocol):
    """The nodes that a server can reach."""

    def nodes(self) -> list[str]:
        """Names of the nodes that are there now: of registered keys, where nodes have any."""

    def exchange(self, outgoing: Callable[[], Outgoing | None], timeout: float) -> Iterator[Reply]:
        """Sends messages and gives replies, one at a time, as they come.

        It ends when all have answered, or ``timeout`` seconds after the first messages were sent.

        Args:
          outgoing: Gives the next message, or None when there is none; after each reply it is asked
            again.
          timeout: Seconds.
        """
