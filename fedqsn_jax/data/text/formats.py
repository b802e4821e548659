"""What the columns of a row mean: the paper's tasks, and formats of a user's own.

Lengths and prompts are those of the code that the authors of FedQSN (arXiv 2508.18911) released.
A column may have several names, since the same data set names its columns differently in TFDS, in
its original files and on the Hugging Face hub.
"""

import dataclasses
import math
import re
import string
from collections.abc import Callable, Iterable
from typing import Any

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.text.sources import Row

Names = tuple[str, ...]
"""The names that one column may have."""

_OUTPUT = "\nOutput: "


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How rows become the input and the target of a model.

    Attributes:
      inputs: For each input its column's names. Classification has one or two inputs (a pair).
      target: The names of the column that has the label or the completion.
      length: Tokens a row, padded and cut.
      labels: Names of the labels in the order of their numbers; empty for generation.
      prompt: From the values of the inputs to the prompt; None for classification.
      test_split: The TFDS split with targets that nothing is trained on.
      ends: Whether a completion ends where its text ends, so that the end is predicted too.
      f1: Whether the F1 score of label 1 is reported beside the accuracy.
    """

    inputs: tuple[Names, ...]
    target: Names
    length: int
    labels: tuple[str, ...] = ()
    prompt: Callable[..., str] | None = None
    test_split: str = "validation"
    ends: bool = True
    f1: bool = False

    @property
    def generates(self) -> bool:
        """Whether the target is text."""
        return self.prompt is not None


def classification_example(row: Row, kind: TextFormat) -> tuple[tuple[str, ...], int]:
    """Returns a row's one or two texts and its label's number.

    Raises:
      ConfigError: A column is missing, or the label is not one of the format's.
    """
    texts = tuple(_text(*_field(row, names), row.where) for names in kind.inputs)
    value, column = _field(row, kind.target)
    return texts, _label(value, kind.labels, f"{row.where}: {column}")


def generation_example(row: Row, kind: TextFormat) -> tuple[str, str]:
    """Returns a row's prompt and completion.

    Raises:
      ConfigError: A column is missing or cannot be understood.
    """
    if kind.prompt is None:
        raise ValueError("generation_example: the format is one of classification")
    fields = [_field(row, names) for names in kind.inputs]
    try:
        prompt = _sound(kind.prompt(*(value for value, _ in fields)))
    except (ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
        reason = str(error) or "its text is too long"
        raise ConfigError(f"{place_of(row, kind.inputs)}: {reason}") from error
    return prompt, _text(*_field(row, kind.target), row.where)


def place_of(row: Row, columns: Iterable[Names]) -> str:
    """Returns where columns of a row stand, for messages: ``train.tsv:12: sentence``."""
    present = (next((n for n in names if n in row.values), names[0]) for names in columns)
    return f"{row.where}: {', '.join(present)}"


def own_format(
    columns: tuple[str, ...],
    target: str,
    length: int,
    labels: tuple[str, ...] = (),
    template: str = "",
) -> TextFormat:
    """Makes the format of a user's own data.

    Args:
      columns: The input columns: one text or a pair for classification, any number for generation.
      target: The column of the label or the completion.
      length: Tokens a row.
      labels: Names of the labels; they make it classification.
      template: The prompt for generation, with columns in braces: ``"{question}\\nAnswer: "``.
        Empty: the columns with `` | `` between them, and then a line ``Output: ``.

    Raises:
      ConfigError: Something is missing, or the template names a column that is not there.
    """
    if not columns or not target or length < 1:
        raise ConfigError(
            "data.columns, data.target, data.length: your own format needs at least one input "
            "column, the column of the label or completion, and a number of tokens"
        )
    inputs = tuple((column,) for column in columns)
    if len(set(columns)) < len(columns):
        raise ConfigError(f"data.columns = {columns!r}: allowed is each column once")
    if target in columns:
        raise ConfigError(
            f"data.target = {target!r}: it is one of data.columns = {columns!r}, so that a model "
            f"would be told what it is to say; allowed is another column"
        )
    if labels:
        if len(columns) > 2:
            raise ConfigError(f"data.columns = {columns!r}: allowed are one or two with labels")
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ConfigError(f"data.labels = {labels!r}: allowed are two or more different names")
        return TextFormat(inputs, (target,), length, labels)
    template = template or " | ".join("{" + column + "}" for column in columns) + _OUTPUT
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError(f"data.template = {template!r}: {error}") from error
    if not named <= set(columns):
        raise ConfigError(
            f"data.template = {template!r}: {', '.join(sorted(named - set(columns)))} is not in "
            f"data.columns = {columns!r}"
        )

    def prompt(*values: Any) -> str:
        return template.format(**dict(zip(columns, map(_as_text, values), strict=True)))

    return TextFormat(inputs, (target,), length, prompt=prompt, test_split="test")


def _field(row: Row, names: Names) -> tuple[Any, str]:
    """The value of the first of the columns that the row has, and its name."""
    for name in names:
        value = row.values.get(name)
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            return value, name
    absent = "no value in" if any(name in row.values for name in names) else "no column"
    raise ConfigError(
        f"{row.where}: {absent} {' or '.join(map(repr, names))}; the row has "
        f"{', '.join(map(repr, row.values)) or 'nothing'}"
    )


def _text(value: Any, column: str, where: str) -> str:
    try:
        return _as_text(value)
    except TypeError as error:
        raise ConfigError(f"{where}: {column}: {error}") from error


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return _sound(value)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, float):
        raise TypeError(f"{value} is no text and no finite number")
    raise TypeError(f"needed is text, not a {type(value).__name__}")


def _sound(text: str) -> str:
    """Makes sure that a text is one: halves of characters, which JSON can escape, are not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(
            f"{text[error.start]!r} is half of a character, a lone surrogate, which no text has"
        ) from error
    return text


def _label(value: Any, labels: tuple[str, ...], place: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if text in labels:
        return labels.index(text)
    if isinstance(value, bool):
        if text.lower() in labels:
            return labels.index(text.lower())
        text = str(int(value))
        if text in labels:
            return labels.index(text)
    # Where names are numbers themselves, a number that is no name must not be taken for a position.
    numbered = not any(name.isdecimal() for name in labels)
    # Python refuses to read thousands of digits.
    if numbered and text.isdecimal() and len(text) < 10 and int(text) < len(labels):
        return int(text)
    numbers = f"0 to {len(labels) - 1}, or " if numbered else ""
    raise ConfigError(f"{place} = {value!r}: allowed are {numbers}{', '.join(labels)}")


def _e2e_prompt(meaning: Any) -> str:
    """``key: value | key: value`` of a restaurant's attributes, in any of their three notations."""
    pairs: list[tuple[str, ...]]
    if isinstance(meaning, dict):
        pairs = [(key, value) for key, value, _ in _table(meaning)]
    elif not isinstance(meaning, str):
        raise TypeError(f"needed is text or a table, not a {type(meaning).__name__}")
    elif "[" in meaning:
        pairs = re.findall(r"([^,\[\]]+)\[([^\]]*)\]", meaning)
    else:
        pairs = [tuple(each.split(":", 1)) for each in meaning.split("|")]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{meaning!r} is not 'key : value | ...' or 'key[value], ...'")
    shown = {"eatType": "Type", "priceRange": "price"}
    named = [(key.strip(), value.strip()) for key, value in pairs]
    return " | ".join(f"{shown.get(key, key)}: {value}" for key, value in named) + _OUTPUT


def _dart_prompt(triples: Any) -> str:
    """``(subject | relation | object), ...``"""
    if isinstance(triples, dict):
        rows: dict[Any, list[str]] = {}
        for _, content, number in _table(triples):
            rows.setdefault(number, []).append(content)
        triples = list(rows.values())
    if not isinstance(triples, list) or not all(isinstance(each, list) for each in triples):
        raise TypeError("needed is a list of lists of texts, or a table")
    return ", ".join(f"({' | '.join(map(_cell, triple))})" for triple in triples) + _OUTPUT


def _table(value: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Header, content and row number of each cell of one of TFDS's tables."""
    table = value.get("table")
    names = ("column_header", "content", "row_number")
    columns = [table.get(name) if isinstance(table, dict) else None for name in names]
    lists = [column for column in columns if isinstance(column, list)]
    if len(lists) < len(names) or len(set(map(len, lists))) > 1:
        raise TypeError(f"needed is a table: lists {', '.join(names)} of one length")
    headers, contents, numbers = lists
    headers, contents = list(map(_cell, headers)), list(map(_cell, contents))
    return list(zip(headers, contents, numbers, strict=True))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise TypeError("a cell has no value")
    return _as_text(value)


def _plain_prompt(*values: Any) -> str:
    return " | ".join(map(_as_text, values)) + _OUTPUT


def _pair(length: int, labels: tuple[str, ...], *inputs: Names, **more: Any) -> TextFormat:
    return TextFormat(inputs, ("label",), length, labels, **more)


_ENTAILMENT = ("entailment", "not_entailment")

FORMATS: dict[str, TextFormat] = {
    "sst2": _pair(50, ("negative", "positive"), ("sentence",)),
    "rte": _pair(160, _ENTAILMENT, ("sentence1",), ("sentence2",)),
    "qnli": _pair(90, _ENTAILMENT, ("question",), ("sentence",)),
    "mnli": _pair(
        128,
        ("entailment", "neutral", "contradiction"),
        ("premise", "sentence1"),
        ("hypothesis", "sentence2"),
        test_split="validation_matched",
    ),
    "mrpc": TextFormat(
        (("sentence1", "#1 String"), ("sentence2", "#2 String")),
        ("label", "Quality"),
        80,
        ("not_equivalent", "equivalent"),
        f1=True,
    ),
    "qqp": TextFormat(
        (("question1",), ("question2",)),
        ("label", "is_duplicate"),
        60,
        ("not_duplicate", "duplicate"),
        f1=True,
    ),
    "e2e": TextFormat(
        (("meaning_representation", "input_text", "mr"),),
        ("human_reference", "target_text", "ref"),
        128,
        prompt=_e2e_prompt,
        test_split="test",
    ),
    "dart": TextFormat(
        (("tripleset", "input_text"),),
        ("target", "target_text"),
        128,
        prompt=_dart_prompt,
        test_split="test",
    ),
    "viggo": TextFormat(
        (("meaning_representation",),), ("target",), 128, prompt=_plain_prompt, test_split="test"
    ),
    "dialogsum": TextFormat(
        (("topic",), ("dialogue",)), ("summary",), 400, prompt=_plain_prompt, test_split="test"
    ),
    # After the separator, every character of a window of 80.
    "running_text": TextFormat((), ("text",), 81, prompt=lambda: "", test_split="test", ends=False),
}
"""The paper's tasks by name, and others: MNLI with its usual length; windows of a running text."""
