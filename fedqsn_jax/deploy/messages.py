"""What travels beside a payload, and how both are put into Flower's records.

Payloads go as one array of bytes, which Flower sends in chunks; in a record of settings the same
bytes take twice the time.
"""

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

_TASK, _ANSWER, _REFUSAL, _LOST, _PAYLOAD = "task", "answer", "refusal", "lost", "payload"
_STYPE = "fedqsn.wire"


def task(payload: bytes, settings: dict[str, Any]) -> RecordDict:
    """Returns what a client is sent: its payload and settings; see `network.Outgoing`."""
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


def lost() -> RecordDict:
    """Returns what a client sends that has not got its payload any more."""
    return RecordDict({_LOST: ConfigRecord({})})


def is_lost(message: Message) -> bool:
    """Whether a message is what `lost` returns."""
    return _LOST in message.content


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
    data = content.array_records[_PAYLOAD]["bytes"].data
    if not isinstance(data, bytes):
        raise TypeError(f"bytes are expected, not {type(data).__name__}")
    return data
