"""A payload that a client keeps, where it is the same in every round and is sent once."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from fedqsn_jax.core.types import Batch, Key
from fedqsn_jax.deploy.client import Answer, Client
from fedqsn_jax.host.atomic_files import replacing

NAME_SIZE = 16
"""Bytes of a payload's name, which the server gives and which is no path."""


class Kept:
    """The file of one payload; others of the same directory are of other runs."""

    def __init__(self, directory: Path, name: bytes) -> None:
        """Takes the client's own directory, and the name that the server has given.

        Raises:
          ValueError: It is no such name.
        """
        if not isinstance(name, bytes) or len(name) != NAME_SIZE:
            raise ValueError(f"a payload's name is {NAME_SIZE} bytes")
        self._file = directory / name.hex()

    def read(self) -> bytes | None:
        """Returns the payload, or None where there is none that can be read."""
        with contextlib.suppress(OSError):
            return self._file.read_bytes()
        return None

    def write(self, payload: bytes) -> None:
        """Keeps a payload, for this user only.

        Raises:
          OSError: It cannot be written.
        """
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(self._file) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as output:
                output.write(payload)


def answer_with(
    kept: Kept,
    client: Client,
    payload: bytes,
    key: Key,
    rows: Batch,
    tell: Callable[[str], object] = print,
) -> Answer | None:
    """Takes part with the payload that was sent, which is kept; or with the kept one.

    Args:
      kept: Where the payload is kept.
      client: The client.
      payload: What the server sent; empty: the client should have it.
      key: See `Client.answer`.
      rows: See `Client.answer`.
      tell: Is told in a line why a payload could not be kept or used.

    Returns:
      The answer; None where nothing was sent and nothing that can be used was kept.

    Raises:
      ValueError: What was sent is damaged, or for another model.
    """
    if payload:
        answer = client.answer(payload, key, rows)
        try:
            kept.write(payload)
        except OSError as error:
            tell(f"the payload is not kept, and will be sent again: {error}")
        return answer
    found = kept.read()
    if found is None:
        return None
    try:
        return client.answer(found, key, rows)
    except ValueError as error:
        tell(f"the payload that was kept is sent again: {error}")
        return None
