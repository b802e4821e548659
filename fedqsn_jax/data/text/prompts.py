"""The prompts of a test set, each once, with all the texts that would answer it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.text.formats import TextFormat, generation_example, place_of
from fedqsn_jax.data.text.packing import PackingOptions, prompt_tokens
from fedqsn_jax.data.text.sources import Row
from fedqsn_jax.data.text.tokenization import TextTokenizer


class Prompts(NamedTuple):
    """Distinct prompts in the order of their first rows.

    Attributes:
      tokens: int32 ``[prompts, length]``, as long as the longest, filled up at the right.
      mask: bool ``[prompts, length]``, true on real tokens.
      texts: The prompts.
      references: For each prompt the completions of all its rows, in order.
    """

    tokens: np.ndarray
    mask: np.ndarray
    texts: list[str]
    references: list[list[str]]


def make_prompts(
    rows: Iterable[Row],
    kind: TextFormat,
    tokenizer: TextTokenizer,
    options: PackingOptions,
    new_tokens: int,
) -> Prompts:
    """Groups rows by their prompt.

    Args:
      rows: At least one.
      kind: What their columns mean.
      tokenizer: Fits the model.
      options: How prompts become tokens. They are cut only where the model has too few positions.
      new_tokens: Tokens that will be generated after each prompt.

    Raises:
      ConfigError: A row lacks a column, or the model has too few positions.
    """
    references: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for row in rows:
        prompt, completion = generation_example(row, kind)
        references.setdefault(prompt, []).append(completion)
        places.setdefault(prompt, place_of(row, kind.inputs))
    tokens = prompt_tokens(list(references), tokenizer, options)
    limit = _limit(tokenizer, options, new_tokens)
    if limit is not None:
        for prompt, ids in zip(references, tokens, strict=True):
            if len(ids) > limit and not options.truncate:
                raise ConfigError(
                    f"{places[prompt]}: a prompt of {len(ids)} tokens, allowed are {limit}: the "
                    f"model's {tokenizer.max_length} positions less {new_tokens} new tokens"
                )
            # The last token of a prompt may be a mark, so tokens before it are left out.
            del ids[limit - 1 : -1]
    length = max(map(len, tokens))
    array = np.full((len(tokens), length), tokenizer.pad, np.int32)
    mask = np.zeros((len(tokens), length), bool)
    for index, ids in enumerate(tokens):
        array[index, : len(ids)] = ids
        mask[index, : len(ids)] = True
    return Prompts(array, mask, list(references), list(references.values()))


def _limit(tokenizer: TextTokenizer, options: PackingOptions, new_tokens: int) -> int | None:
    """Tokens that a prompt may have; None: any number."""
    if tokenizer.max_length is None:
        return None
    if options.encoder_decoder:
        return tokenizer.max_length
    if new_tokens >= tokenizer.max_length:
        raise ConfigError(
            f"{new_tokens} new tokens: allowed are fewer than the {tokenizer.max_length} positions "
            f"of the model"
        )
    return tokenizer.max_length - new_tokens
