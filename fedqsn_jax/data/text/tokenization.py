"""Tokens from text: a ``tokenizer.json`` and the ids that the model's configuration names."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.core.json_text import parse_json

_USUAL_SHARE = 0.99
"""Of a vocabulary's rows at least so many have a token in most models, though rows are reserved
and padded: in Qwen2 of 7 billion parameters .997, in DeepSeek-Coder .993."""

_LEAST_SHARE = 0.97
"""And in all that are known to be right: DeepSeek-LLM has .977. The nearest mistake is below that:
the tokenizer of BERT's cased model has .950 of the uncased one's."""

_FEW, _LEAST_SHARE_BUT_FEW = 64, 0.9
"""Rows to which a vocabulary is rounded up are a larger share of a small one."""


class Encoded(NamedTuple):
    """One text, or a pair, as a model reads it.

    Attributes:
      tokens: Token ids.
      types: 0 for the first text and what surrounds it, 1 for the second.
      cut: Whether tokens were left out.
    """

    tokens: list[int]
    types: list[int]
    cut: bool


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that fits a model.

    Attributes:
      tokenizer: The ``tokenizers.Tokenizer``, without padding and cutting of its own.
      file: The ``tokenizer.json``.
      digest: Hexadecimal digest of that file.
      pad: What fills up rows; no model may read it.
      ends: Ids that end a completion, the first of them in training; empty for a model that
        generates nothing.
      max_length: Positions that the model has; None: any number.
      note: What the user should know about the fit, in one line; empty: nothing.
    """

    tokenizer: Any
    file: Path
    digest: str
    pad: int
    ends: tuple[int, ...]
    max_length: int | None
    note: str = ""

    def encode(
        self, texts: Sequence[str | tuple[str, ...]], special: bool = True, length: int = 0
    ) -> list[Encoded]:
        """Encodes many texts at once, on all cores.

        Args:
          texts: Texts, or tuples of one or two.
          special: Whether the tokens that mark beginnings and ends are added.
          length: Where above 0, encodings are cut to so many tokens: the longer of a pair first,
            marks always kept.
        """
        tokenizer = self.tokenizer
        inputs = [text[0] if isinstance(text, tuple) and len(text) == 1 else text for text in texts]
        if length:
            tokenizer.enable_truncation(length, strategy="longest_first")
        try:
            encodings = tokenizer.encode_batch(inputs, add_special_tokens=special)
        finally:
            tokenizer.no_truncation()
        return [Encoded(each.ids, each.type_ids, bool(each.overflowing)) for each in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens up to the first end, without marks and outer whitespace."""
        kept = itertools.takewhile(lambda token: token not in self.ends, map(int, tokens))
        return self.tokenizer.decode(list(kept), skip_special_tokens=True).strip()


def load_tokenizer(
    directory: Path | str,
    vocabulary: int,
    max_length: int | None,
    pad: int | None = None,
    ends: Sequence[int] = (),
) -> TextTokenizer:
    """Reads ``tokenizer.json`` and makes sure that a model knows all of its tokens.

    Args:
      directory: Where ``tokenizer.json`` lies, or that file itself.
      vocabulary: Rows of the model's embedding.
      max_length: Positions that the model has; None: any number.
      pad: The model's padding id; None (GPT-2, LLaMA): 0, which is masked like any other.
      ends: The model's end-of-text ids; the first ends completions.

    Raises:
      ConfigError: The file is missing or damaged, or does not match the model's vocabulary.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "text data needs the tokenizers library: pip install 'fedqsn_jax[language]'"
        ) from error

    file = user_path(directory)
    file = file if file.name.endswith(".json") else file / "tokenizer.json"
    try:
        content = file.read_bytes()
        settings = parse_json(content)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; a tokenizer.json is needed") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # The library raises plain Exception for whatever it cannot read.
        raise ConfigError(f"{file}: not a tokenizer ({' '.join(str(error).split())})") from error
    if not settings:
        raise ConfigError(f"{file}: not a tokenizer (it is empty)")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check_vocabulary(tokenizer, file, vocabulary, pad, ends)
    return TextTokenizer(
        tokenizer,
        file,
        hashlib.sha256(content).hexdigest(),
        pad if pad is not None else 0,
        tuple(ends),
        max_length,
        _check_size(tokenizer, file, vocabulary),
    )


def _check_size(tokenizer: Any, file: Path, vocabulary: int) -> str:
    """Makes sure that a vocabulary has no more rows without a token than models have.

    Returns:
      A note where it has more than most.
    """
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    share = count / vocabulary
    few = vocabulary - count < _FEW and share >= _LEAST_SHARE_BUT_FEW
    if share >= _USUAL_SHARE or few:
        return ""
    found = (
        f"{file}: it has {count} tokens, but the model's vocabulary {vocabulary} (vocab_size in "
        f"config.json)"
    )
    if share < _LEAST_SHARE:
        raise ConfigError(f"{found}; it belongs to another model")
    return f"{found}; make sure that it belongs to this model"


def _check_vocabulary(
    tokenizer: Any, file: Path, vocabulary: int, pad: int | None, ends: Sequence[int]
) -> None:
    ids = tokenizer.get_vocab(with_added_tokens=True)
    token, largest = max(ids.items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocabulary:
        raise ConfigError(
            f"{file}: token {token!r} has the id {largest}, but the model's vocabulary has "
            f"{vocabulary} tokens (vocab_size in config.json); allowed are ids below that"
        )
    marks = tokenizer.get_added_tokens_decoder()
    tokens = {number: token for token, number in ids.items()}
    for name, number in (("pad_token_id", pad), *(("eos_token_id", end) for end in ends)):
        if number is None:
            continue
        if number not in tokens:
            raise ConfigError(
                f"{file}: it has no token {number}, which is the {name} in the model's config.json"
            )
        if marks and number not in marks:
            raise ConfigError(
                f"{file}: token {number}, the {name} in the model's config.json, is the ordinary "
                f"{tokens[number]!r} here; it belongs to another model"
            )
