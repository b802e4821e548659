"""Tokenized rows as arrays of one size: what language models train and are tested on.

The names are those that `models.language` reads: ``tokens``, ``mask`` (real tokens) and, where the
tokenizer tells the texts of a pair apart, ``token_types``; encoder-decoders have ``target_tokens``
and ``target_mask``. For decoders ``loss_mask`` says which tokens are to be predicted.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.arrays import ids_array, plain_id
from fedqsn_jax.data.splits import CLIENT_COLUMN, Rows
from fedqsn_jax.data.text.formats import (
    TextFormat,
    classification_example,
    generation_example,
    place_of,
)
from fedqsn_jax.data.text.sources import Row
from fedqsn_jax.data.text.tokenization import TextTokenizer

_ROWS_AT_A_TIME = 1024

OnRows = Callable[[int], None]
"""Told how many more rows are done."""


class Packed(NamedTuple):
    """Rows as arrays.

    Attributes:
      arrays: Named arrays ``[rows, ...]``; with `CLIENT_COLUMN` where all rows have it.
      cut: Whether a row was too long and lost tokens at its end, bool ``[rows]``.
    """

    arrays: Rows
    cut: np.ndarray


class PackingOptions(NamedTuple):
    """How rows become arrays, beside their format.

    Attributes:
      length: Tokens a row.
      target_length: Tokens of an encoder-decoder's completion; 0: ``length``.
      truncate: Whether longer rows are cut; otherwise they are refused.
      separator: Whether a decoder's prompt ends with the end-of-text token, as in the data that the
        authors of FedQSN released for GPT-2.
      encoder_decoder: Whether prompt and completion go to different halves of the model.
      client_column: The column that says whose a row is, if rows have it.
    """

    length: int
    target_length: int = 0
    truncate: bool = True
    separator: bool = True
    encoder_decoder: bool = False
    client_column: str = CLIENT_COLUMN


def pack(
    rows: Sequence[Row],
    kind: TextFormat,
    tokenizer: TextTokenizer,
    options: PackingOptions,
    on_rows: OnRows = lambda count: None,
) -> Packed:
    """Tokenizes rows and packs them.

    Args:
      rows: At least one.
      kind: What their columns mean.
      tokenizer: Fits the model.
      options: Sizes and the kind of model.
      on_rows: Told about progress.

    Returns:
      For classification ``tokens`` int32 ``[rows, length]``, ``mask`` bool and ``token_types``
      int32 likewise, ``label`` int32 ``[rows]``; for decoders ``tokens``, ``mask``, ``loss_mask``;
      for encoder-decoders ``tokens``, ``mask``, ``target_tokens``, ``target_mask``. All are filled
      up at the right.

    Raises:
      ConfigError: A row lacks a column, has a value that is not allowed, or is too long and may not
        be cut.
    """
    if not kind.generates:
        packed = _classification(rows, kind, tokenizer, options, on_rows)
    elif options.encoder_decoder:
        packed = _sequence_to_sequence(rows, kind, tokenizer, options, on_rows)
    else:
        packed = _causal(rows, kind, tokenizer, options, on_rows)
    ids = _client_ids(rows, options.client_column)
    return packed if ids is None else packed._replace(arrays=packed.arrays | {CLIENT_COLUMN: ids})


def prompt_tokens(
    prompts: Sequence[str], tokenizer: TextTokenizer, options: PackingOptions
) -> list[list[int]]:
    """Returns the tokens of prompts, uncut, as a model reads them before it generates."""
    ends = _separator(tokenizer, options)
    return [each.tokens + ends for each in tokenizer.encode(prompts)]


def _classification(
    rows: Sequence[Row],
    kind: TextFormat,
    tokenizer: TextTokenizer,
    options: PackingOptions,
    on_rows: OnRows,
) -> Packed:
    length = options.length
    limit = length if options.truncate else 0
    arrays = _empty(len(rows), length, tokenizer.pad)
    arrays["label"] = np.zeros(len(rows), np.int32)
    (probe,) = tokenizer.encode([("a", "b")])
    if len(kind.inputs) == 2 and any(probe.types):
        arrays["token_types"] = np.zeros((len(rows), length), np.int32)
    cut = np.zeros(len(rows), bool)
    for indices in _chunks(len(rows)):
        examples = [classification_example(rows[index], kind) for index in indices]
        encoded = tokenizer.encode([texts for texts, _ in examples], length=limit)
        for index, each, (_, label) in zip(indices, encoded, examples, strict=True):
            _check_length(rows[index], kind, len(each.tokens), length)
            cut[index] = each.cut
            _fill(arrays, "tokens", "mask", index, each.tokens)
            if "token_types" in arrays:
                arrays["token_types"][index, : len(each.types)] = each.types
            arrays["label"][index] = label
        on_rows(len(indices))
    return Packed(arrays, cut)


def _causal(
    rows: Sequence[Row],
    kind: TextFormat,
    tokenizer: TextTokenizer,
    options: PackingOptions,
    on_rows: OnRows,
) -> Packed:
    length = options.length
    arrays = _empty(len(rows), length, tokenizer.pad)
    arrays["loss_mask"] = np.zeros((len(rows), length), bool)
    cut = np.zeros(len(rows), bool)
    for index, prompt, completion in _generation(rows, kind, tokenizer, on_rows):
        prompt = prompt + _separator(tokenizer, options)
        tokens = prompt + completion
        if not options.truncate:
            _check_length(rows[index], kind, len(tokens), length)
        cut[index] = len(tokens) > length
        _fill(arrays, "tokens", "mask", index, tokens[:length])
        arrays["loss_mask"][index, len(prompt) : len(tokens)] = True
    return Packed(arrays, cut)


def _sequence_to_sequence(
    rows: Sequence[Row],
    kind: TextFormat,
    tokenizer: TextTokenizer,
    options: PackingOptions,
    on_rows: OnRows,
) -> Packed:
    length, target_length = options.length, options.target_length or options.length
    arrays = _empty(len(rows), length, tokenizer.pad)
    target = _empty(len(rows), target_length, tokenizer.pad)
    arrays |= {"target_tokens": target["tokens"], "target_mask": target["mask"]}
    cut = np.zeros(len(rows), bool)
    for index, prompt, completion in _generation(rows, kind, tokenizer, on_rows):
        if not options.truncate:
            _check_length(rows[index], kind, len(prompt), length)
            _check_length(rows[index], kind, len(completion), target_length)
        cut[index] = len(prompt) > length or len(completion) > target_length
        _fill(arrays, "tokens", "mask", index, prompt[:length])
        _fill(arrays, "target_tokens", "target_mask", index, completion[:target_length])
    return Packed(arrays, cut)


def _generation(
    rows: Sequence[Row], kind: TextFormat, tokenizer: TextTokenizer, on_rows: OnRows
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Each row's index, the tokens of its prompt, and its completion's, with their end if any."""
    for indices in _chunks(len(rows)):
        examples = [generation_example(rows[index], kind) for index in indices]
        prompts = tokenizer.encode([prompt for prompt, _ in examples])
        completions = tokenizer.encode([completion for _, completion in examples], special=False)
        ends = list(tokenizer.ends[:1]) if kind.ends else []
        for index, prompt, completion in zip(indices, prompts, completions, strict=True):
            yield index, prompt.tokens, completion.tokens + ends
        on_rows(len(indices))


def _separator(tokenizer: TextTokenizer, options: PackingOptions) -> list[int]:
    if options.encoder_decoder or not options.separator:
        return []
    return list(tokenizer.ends[:1])


def _check_length(row: Row, kind: TextFormat, tokens: int, length: int) -> None:
    if tokens > length:
        place = place_of(row, (*kind.inputs, *([kind.target] if kind.generates else [])))
        raise ConfigError(f"{place}: {tokens} tokens, allowed are {length} (data.length)")


def _chunks(rows: int) -> Iterator[range]:
    for start in range(0, rows, _ROWS_AT_A_TIME):
        yield range(start, min(start + _ROWS_AT_A_TIME, rows))


def _empty(rows: int, length: int, pad: int) -> Rows:
    return {
        "tokens": np.full((rows, length), pad, np.int32),
        "mask": np.zeros((rows, length), bool),
    }


def _fill(arrays: Rows, name: str, mask: str, index: int, tokens: list[int]) -> None:
    arrays[name][index, : len(tokens)] = tokens
    arrays[mask][index, : len(tokens)] = True


def _client_ids(rows: Sequence[Row], column: str) -> np.ndarray | None:
    """The rows' own clients, if they say so."""
    ids: list[int | str] = []
    missing: Row | None = None
    for row in rows:
        try:
            each = plain_id(row.values.get(column))
        except ValueError as error:
            raise ConfigError(f"{row.where}: {column}: {error}") from error
        if each is not None:
            ids.append(each)
        elif missing is None:
            missing = row
    if not ids:
        return None
    if missing is not None:
        raise ConfigError(f"{missing.where}: no value in {column!r}, which other rows have")
    return ids_array(ids)
