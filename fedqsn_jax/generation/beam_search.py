"""Text from a language model: greedy and beam search with a key-value cache, in static shapes.

The model is three pure functions (see `Decoder`), so that this file knows no architecture. A search
is one `while` loop that ends as soon as no row can get a better text.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fedqsn_jax.core.types import Array, Batch, Params

Cache = Any
"""A pytree of arrays of fixed shapes, which only the model understands."""

_NOTHING = -1  # Stands where a row has no token; no token has this id.


class Decoder(Protocol):
    """A model that predicts one token after the other; all of it is pure and can be jitted."""

    @property
    def prefill(self) -> Callable[[Params, Batch, int], tuple[Array, Cache]]:
        """``(params, batch, new_tokens) -> (logits, cache)``: reads the prompts.

        The batch has ``tokens`` int32 ``[rows, length]`` and ``mask``, padded on any side; logits
        are float32 ``[rows, vocabulary]``, of the first new token. The cache has room for
        ``new_tokens`` steps, a static number.
        """

    @property
    def step(self) -> Callable[[Params, Array, Cache], tuple[Array, Cache]]:
        """``(params, tokens, cache) -> (logits, cache)``: one more token, int32 ``[rows]``."""

    @property
    def take_rows(self) -> Callable[[Cache, Array], Cache]:
        """``(cache, rows) -> cache``: gathers rows, int32 ``[any]``."""


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How texts are searched for: static. The defaults are those of the paper's code.

    Attributes:
      new_tokens: Most tokens of a text, its end included.
      beams: Hypotheses that are kept; 1: greedy search.
      no_repeat_ngram: No sequence of so many tokens may occur twice; 0: any may.
      length_penalty: A hypothesis of n tokens, its end included, scores its log-probability
        divided by ``n ** length_penalty``: larger favours longer texts. Greedy search has no use
        for it.

    Raises:
      ValueError: A setting is out of range.
    """

    new_tokens: int = 64
    beams: int = 10
    no_repeat_ngram: int = 4
    length_penalty: float = 0.9

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 1), ("beams", 1), ("no_repeat_ngram", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: allowed is {least} or more")


class Generated(NamedTuple):
    """The best text found for each row.

    Attributes:
      tokens: int32 ``[rows, new_tokens]``, with its end if it has one, then padding.
      scores: float32 ``[rows]``: log-probability by ``length ** length_penalty``; of greedy search
        the log-probability.
    """

    tokens: Array
    scores: Array


def make_generator(
    decoder: Decoder,
    settings: GenerationSettings,
    ends: tuple[int, ...],
    pad: int,
    *,
    prompt_ngrams: bool = True,
) -> Callable[[Params, Batch], Generated]:
    """Makes the pure function that continues prompts; to be jitted by the caller.

    Args:
      decoder: The model.
      settings: How to search.
      ends: Tokens that end a text; may be empty.
      pad: Fills up texts that have ended.
      prompt_ngrams: Whether ``no_repeat_ngram`` counts the prompt's n-grams too, as transformers
        does for decoders; False for encoder-decoders.

    Returns:
      ``(params, batch) -> Generated``; the batch has ``tokens`` and ``mask``.
    """

    def generate(params: Params, batch: Batch) -> Generated:
        # The first token comes from the prompts, and the last is never fed back.
        logits, cache = decoder.prefill(params, batch, max(settings.new_tokens - 1, 1))
        rows = batch["tokens"].shape[0]
        before = (
            _right_aligned(batch["tokens"], batch["mask"])
            if prompt_ngrams and settings.no_repeat_ngram
            else jnp.zeros((rows, 0), jnp.int32)
        )
        search = _Search(
            decoder=decoder,
            params=params,
            settings=settings,
            before=before,
            ends=jnp.asarray(ends, int),
            pad=pad,
        )
        return (_greedy if settings.beams == 1 else _beam_search)(search, logits, cache)

    return generate


def ban_repeated_ngrams(scores: Array, history: Array, size: int) -> Array:
    """Forbids every token that would complete an n-gram for the second time.

    Args:
      scores: ``[rows, vocabulary]``.
      history: int32 ``[rows, length]``: the tokens so far, at the right end; -1 before them.
      size: The n of the n-grams, at least 1.

    Returns:
      The scores, with -inf for forbidden tokens.
    """
    rows, length = history.shape
    if length < size:
        return scores
    last = history[:, length - (size - 1) :]
    windows = length - size + 1
    repeated = history[:, :windows] != _NOTHING
    for offset in range(size - 1):
        repeated &= history[:, offset : offset + windows] == last[:, offset : offset + 1]
    banned = jnp.where(repeated, history[:, size - 1 :], scores.shape[1])
    return scores.at[jnp.arange(rows)[:, None], banned].set(-jnp.inf, mode="drop")


def _right_aligned(tokens: Array, mask: Array) -> Array:
    """The real tokens of each row at its right end, and `_NOTHING` before them."""
    order = jnp.argsort(mask != 0, axis=1, stable=True)
    real = jnp.take_along_axis(mask != 0, order, axis=1)
    return jnp.where(real, jnp.take_along_axis(tokens, order, axis=1), _NOTHING)


def _log_probabilities(logits: Array, history: Array, settings: GenerationSettings) -> Array:
    """``[rows, vocabulary]``; forbidden tokens are taken out and the rest is not normalized anew,
    as in transformers."""
    log_odds = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    if settings.no_repeat_ngram:
        log_odds = ban_repeated_ngrams(log_odds, history, settings.no_repeat_ngram)
    return log_odds


def _history(before: Array, tokens: Array, count: Array) -> Array:
    """The prompts and the first ``count`` of ``tokens [rows, new]``, at the right end."""
    chosen = jnp.arange(tokens.shape[1])[None] < count
    filled = jnp.where(chosen, tokens, _NOTHING)
    joined = jnp.concatenate([before, filled], axis=1)
    # What is rolled over to the left are the slots that are still empty.
    return jnp.roll(joined, tokens.shape[1] - count, axis=1)


def _is_end(tokens: Array, ends: Array) -> Array:
    return (tokens[:, None] == ends[None]).any(axis=1)


class _Search(NamedTuple):
    """What a search goes by.

    Attributes:
      decoder: The model.
      params: Its parameters.
      settings: How to search.
      before: int32 ``[rows, length]``: tokens of the prompts whose n-grams count, at the right end.
      ends: int ``[any]``: tokens that end a text.
      pad: Fills up texts that have ended.
    """

    decoder: Decoder
    params: Params
    settings: GenerationSettings
    before: Array
    ends: Array
    pad: int

    def score(self, total: Array, length: Array | int) -> Array:
        """Returns the scores of log-probabilities of texts of a length."""
        return total / jnp.asarray(length, jnp.float32) ** self.settings.length_penalty


def _greedy(search: _Search, logits: Array, cache: Cache) -> Generated:
    settings, before, ends, pad = search.settings, search.before, search.ends, search.pad
    rows = logits.shape[0]

    def choose(
        count: Array, logits: Array, tokens: Array, score: Array, ended: Array
    ) -> tuple[Array, Array, Array, Array]:
        log_odds = _log_probabilities(logits, _history(before, tokens, count), settings)
        chosen = jnp.where(ended, pad, log_odds.argmax(axis=-1).astype(jnp.int32))
        score = score + jnp.where(ended, 0, log_odds.max(axis=-1))
        tokens = tokens.at[:, count].set(chosen)
        return chosen, tokens, score, ended | _is_end(chosen, ends)

    def running(carry: tuple) -> Array:
        count, _, _, _, ended, _ = carry
        return (count < settings.new_tokens) & ~ended.all()

    def body(carry: tuple) -> tuple:
        count, chosen, tokens, score, ended, cache = carry
        logits, cache = search.decoder.step(search.params, chosen, cache)
        return (count + 1, *choose(count, logits, tokens, score, ended), cache)

    start = (
        jnp.full((rows, settings.new_tokens), pad, jnp.int32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, bool),
    )
    first = choose(jnp.int32(0), logits, *start)
    _, _, tokens, score, _, _ = jax.lax.while_loop(running, body, (jnp.int32(1), *first, cache))
    return Generated(tokens, score)


class _Beams(NamedTuple):
    """The state of a beam search over ``rows`` prompts.

    Attributes:
      tokens: int32 ``[rows, beams, new_tokens]``: hypotheses that have not ended.
      totals: float32 ``[rows, beams]``: their log-probabilities, descending.
      best_tokens: int32 ``[rows, new_tokens]``: the best text that has ended.
      best_scores: float32 ``[rows]``: its score; -inf if there is none.
      parents: int32 ``[rows, beams]``: the beam that each hypothesis continues.
    """

    tokens: Array
    totals: Array
    best_tokens: Array
    best_scores: Array
    parents: Array


def _beam_search(search: _Search, logits: Array, cache: Cache) -> Generated:
    """Keeps the best hypotheses alive, and of those that have ended the best one.

    Of all continuations of a row's hypotheses, ordered by log-probability, the first ``beams`` that
    do not end live on, and those among the first ``beams`` that end are candidates for the result
    (as in transformers). The search is over once no live hypothesis can beat the result: a
    log-probability never rises, and no text is longer than ``new_tokens``.
    """
    settings = search.settings
    rows, size = logits.shape[0], settings.beams
    search = search._replace(before=jnp.repeat(search.before, size, axis=0))
    row_of_beam = jnp.arange(rows)[:, None] * size

    def running(carry: tuple[Array, _Beams, Cache]) -> Array:
        count, beams, _ = carry
        longest = settings.new_tokens if settings.length_penalty > 0 else count + 1
        attainable = search.score(beams.totals[:, 0], longest)
        return (count < settings.new_tokens) & (attainable > beams.best_scores).any()

    def body(carry: tuple[Array, _Beams, Cache]) -> tuple[Array, _Beams, Cache]:
        count, beams, cache = carry
        cache = search.decoder.take_rows(cache, (row_of_beam + beams.parents).reshape(-1))
        chosen = beams.tokens[:, :, count - 1].reshape(-1)
        logits, cache = search.decoder.step(search.params, chosen, cache)
        return count + 1, _longer(search, count, logits, beams), cache

    start = _Beams(
        tokens=jnp.full((rows, size, settings.new_tokens), search.pad, jnp.int32),
        # All beams of a row are the same at first: only one of them may count.
        totals=jnp.full((rows, size), -jnp.inf).at[:, 0].set(0),
        best_tokens=jnp.full((rows, settings.new_tokens), search.pad, jnp.int32),
        best_scores=jnp.full(rows, -jnp.inf),
        parents=jnp.zeros((rows, size), jnp.int32),
    )
    first = _longer(search, jnp.int32(0), jnp.repeat(logits, size, axis=0), start)
    cache = search.decoder.take_rows(cache, jnp.repeat(jnp.arange(rows), size))
    count, beams, _ = jax.lax.while_loop(running, body, (jnp.int32(1), first, cache))
    # Hypotheses that have reached the largest length count as they are.
    unfinished = search.score(beams.totals[:, 0], settings.new_tokens)
    wins = (count == settings.new_tokens) & (unfinished > beams.best_scores)
    return Generated(
        jnp.where(wins[:, None], beams.tokens[:, 0], beams.best_tokens),
        jnp.where(wins, unfinished, beams.best_scores),
    )


def _longer(search: _Search, count: Array, logits: Array, beams: _Beams) -> _Beams:
    """Chooses the token at position ``count`` of every hypothesis."""
    rows, size = beams.totals.shape
    history = _history(search.before, beams.tokens.reshape(rows * size, -1), count)
    log_odds = _log_probabilities(logits, history, search.settings)
    totals = beams.totals[:, :, None] + log_odds.reshape(rows, size, -1)
    ended = totals[:, :, search.ends]
    totals = totals.at[:, :, search.ends].set(-jnp.inf)
    # In two stages: sorting all continuations of a row at once costs many times more.
    width = min(size, totals.shape[-1])
    totals, tokens = jax.lax.top_k(totals, width)
    totals, place = jax.lax.top_k(totals.reshape(rows, -1), size)
    tokens = jnp.take_along_axis(tokens.reshape(rows, -1), place, axis=1).astype(jnp.int32)
    parents = (place // width).astype(jnp.int32)
    live = jnp.take_along_axis(beams.tokens, parents[:, :, None], axis=1)
    live = live.at[:, :, count].set(tokens)
    beams = beams._replace(totals=totals)
    best_tokens, best_scores = _better(search, count, ended, beams)
    return _Beams(
        tokens=live,
        totals=totals,
        best_tokens=best_tokens,
        best_scores=best_scores,
        parents=parents,
    )


def _better(search: _Search, count: Array, ended: Array, beams: _Beams) -> tuple[Array, Array]:
    """The best texts that have ended, those included that end at position ``count``.

    Args:
      search: What the search goes by.
      count: The position, int32 scalar.
      ended: ``[rows, beams, ends]``: the log-probabilities of those that end there.
      beams: The hypotheses before, with the log-probabilities of those that go on.
    """
    ends, (rows, size) = search.ends, beams.totals.shape
    if not len(ends):
        return beams.best_tokens, beams.best_scores
    flat = ended.reshape(rows, -1)
    earlier = (flat[:, None, :] > flat[:, :, None]).sum(axis=-1)
    earlier += (beams.totals[:, None, :] > flat[:, :, None]).sum(axis=-1)
    flat = jnp.where(earlier < size, flat, -jnp.inf)
    place = flat.argmax(axis=-1)
    score = search.score(flat.max(axis=-1), count + 1)
    parent = (place // len(ends))[:, None, None]
    tokens = jnp.take_along_axis(beams.tokens, parent, axis=1)[:, 0]
    tokens = tokens.at[:, count].set(ends[place % len(ends)].astype(jnp.int32))
    wins = score > beams.best_scores
    return (
        jnp.where(wins[:, None], tokens, beams.best_tokens),
        jnp.where(wins, score, beams.best_scores),
    )
