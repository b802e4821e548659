"""The history of a run's metrics in chunks that are written once.

A checkpoint that held the whole history would cost more the longer the run. So every
`CHUNK_ENTRIES` entries become a file that is never written again, and a checkpoint holds the
entries after the last of these files, and the file's digest. A chunk holds the digest of the one
before it: so one digest covers all of them, and the first file that is not what was saved is known.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from fedqsn_jax.host.atomic_files import replacing

History = list[dict[str, Any]]
"""JSON objects, one for each evaluated round."""

CHUNK_ENTRIES = 128
"""Entries of a chunk."""


class HistoryError(ValueError):
    """A chunk that is missing or not what was saved; the message is one line."""


class ChunkedHistory:
    """The chunks of one run's history: ``000000.json``, ``000001.json``, and so on."""

    def __init__(self, directory: Path) -> None:
        """Names the directory, and touches nothing."""
        self._directory = directory
        # Of each chunk that is written: its digest, and its last entry.
        self._written: list[tuple[str, dict[str, Any]]] = []

    def store(self, history: History, write: bool = True) -> dict[str, Any]:
        """Writes the chunks that have become full since the last call.

        Args:
          history: All entries so far. They are those of the last call, or of what `load` returned,
            and more; for another history all chunks are written again.
          write: Whether this process writes the files, or only needs to know what they hold.

        Returns:
          What a checkpoint has to hold, a JSON value that shares nothing with ``history``:
          ``chunks``, their number; ``digest``, of the last one; ``entries``, those after it.

        Raises:
          OSError: The file system refuses.
          TypeError: An entry is no JSON.
        """
        if not self._continues(history):
            self._written = []
        while len(history) >= (len(self._written) + 1) * CHUNK_ENTRIES:
            start = len(self._written) * CHUNK_ENTRIES
            entries = history[start : start + CHUNK_ENTRIES]
            text = json.dumps({"previous": self._digest(), "entries": entries})
            if write:
                self._directory.mkdir(parents=True, exist_ok=True)
                with replacing(self._file(len(self._written))) as temporary:
                    temporary.write_text(text)
            self._written.append((_digest(text), entries[-1]))
        rest = history[len(self._written) * CHUNK_ENTRIES :]
        return {
            "chunks": len(self._written),
            "digest": self._digest(),
            "entries": json.loads(json.dumps(rest)),
        }

    def load(self, stored: dict[str, Any]) -> History:
        """Returns the history of a checkpoint that holds what `store` has returned.

        Raises:
          HistoryError: A chunk is missing, or is not what was saved.
        """
        expected = stored["digest"]
        chunks: list[History] = []
        written: list[tuple[str, dict[str, Any]]] = []
        # From the last on: each says what the one before it has to be.
        for number in reversed(range(stored["chunks"])):
            file = self._file(number)
            try:
                data = file.read_bytes()
            except OSError as error:
                raise HistoryError(f"{file}: {error.strerror}") from error
            if _digest(data) != expected:
                raise HistoryError(f"{file}: its digest is not that of its contents")
            chunk = json.loads(data)
            chunks.append(chunk["entries"])
            written.append((expected, chunk["entries"][-1]))
            expected = chunk["previous"]
        self._written = written[::-1]
        return [entry for chunk in reversed(chunks) for entry in chunk] + stored["entries"]

    def _continues(self, history: History) -> bool:
        end = len(self._written) * CHUNK_ENTRIES
        return not end or (len(history) >= end and history[end - 1] == self._written[-1][1])

    def _digest(self) -> str:
        return self._written[-1][0] if self._written else ""

    def _file(self, number: int) -> Path:
        return self._directory / f"{number:06d}.json"


def _digest(data: str | bytes) -> str:
    data = data.encode() if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=32).hexdigest()
