"""What travels beside a payload, and how both are put into Flower's records.

Payloads go as one array of bytes, which Flower sends in chunks; in a record of settings the same
bytes take twice the time.
"""

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

_TASK, _ANSWER, _REFUSAL, _PAYLOAD, _STYPE = "task", "answer", "refusal", "payload", "fedqsn.wire"


def task(payload: bytes, settings: dict[str, Any]) -> RecordDict:
    """Returns what a client is sent: its payload, ``plan``, ``token`` and ``key``."""
    return RecordDict({_TASK: ConfigRecord(settings), _PAYLOAD: _array(payload)})


def read_task(message: Message) -> tuple[bytes, dict[str, Any]]:
    """Inverts `task`."""
    return _bytes(message.content), dict(message.content[_TASK])


def answer(payload: bytes, settings: dict[str, Any]) -> RecordDict:
    """Returns what a client sends back: its update, and ``token``, ``examples`` and ``loss``."""
    return RecordDict({_ANSWER: ConfigRecord(settings), _PAYLOAD: _array(payload)})


def refusal(reason: str) -> RecordDict:
    """Returns what a client sends that cannot take part; the reason names none of its rows."""
    return RecordDict({_REFUSAL: ConfigRecord({"reason": reason})})


def read_answer(message: Message) -> tuple[bytes, dict[str, Any]] | str:
    """Returns what `answer` was given, or the reason of a `refusal`.

    Raises:
      ValueError: It is neither.
    """
    content = message.content
    if _REFUSAL in content:
        return str(content[_REFUSAL]["reason"])
    try:
        return _bytes(content), dict(content[_ANSWER])
    except (KeyError, TypeError) as error:
        raise ValueError(f"neither an answer nor a refusal: {error!r}") from error


def _array(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array("uint8", (len(payload),), _STYPE, payload)})


def _bytes(content: RecordDict) -> bytes:
    array = content.array_records[_PAYLOAD]["bytes"]
    return bytes(np.frombuffer(array.data, np.uint8))
