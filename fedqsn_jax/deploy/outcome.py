"""What the two programs of a client share; only the standard library is imported here."""

from typing import NamedTuple

SETTINGS = "fedqsn-client"
"""The name, in the node's configuration, of the client's own settings file."""


class Outcome(NamedTuple):
    """What becomes of a message: an update, or why there is none.

    Attributes:
      payload: The update's bytes; empty: there is none.
      examples: Number of the client's rows.
      loss: Its training loss.
      refusal: Why there is no update, in words for the server: they name no value and no file.
      lost: Whether the client has not got the payload that it was to keep.
    """

    payload: bytes = b""
    examples: int = 0
    loss: float = 0.0
    refusal: str = ""
    lost: bool = False
