"""Search for texts: a toy model with a cache, against search by hand and over all texts."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.generation.beam_search import (
    GenerationSettings,
    _beam_search,
    _Search,
    ban_repeated_ngrams,
    make_generator,
)

VOCABULARY, PAD, END = 6, 0, 5
ROWS, LENGTH = 3, 4


class Toy(NamedTuple):
    """Logits depend on all tokens so far, in order: a state is turned by each of them.

    The cache is the state and the number of steps that are left in it, which a test can look at.
    """

    width: int = 5

    def init(self, seed):
        rng = np.random.default_rng(seed)
        return {
            "embed": jnp.asarray(rng.normal(size=(VOCABULARY, self.width)), jnp.float32),
            "turn": jnp.asarray(rng.normal(size=(self.width, self.width)), jnp.float32),
            "head": jnp.asarray(rng.normal(0, 2, (self.width, VOCABULARY)), jnp.float32),
        }

    def read(self, params, state, tokens):
        return jnp.tanh(state @ params["turn"] + params["embed"][tokens])

    def prefill(self, params, batch, new_tokens):
        state = jnp.zeros((batch["tokens"].shape[0], self.width))
        for position in range(batch["tokens"].shape[1]):
            after = self.read(params, state, batch["tokens"][:, position])
            state = jnp.where(batch["mask"][:, position, None], after, state)
        left = jnp.full(state.shape[0], new_tokens)
        return state @ params["head"], {"state": state, "left": left}

    def step(self, params, tokens, cache):
        state = self.read(params, cache["state"], tokens)
        logits = state @ params["head"]
        # Without room in the cache the model gives nonsense.
        logits = jnp.where(cache["left"][:, None] > 0, logits, jnp.nan)
        return logits, {"state": state, "left": cache["left"] - 1}

    def take_rows(self, cache, rows):
        return jax.tree.map(lambda leaf: leaf[rows], cache)


TOY = Toy()


def prompts(seed=0, padding="right"):
    """Prompts of 4, 3 and 1 tokens, without ends, and their tokens one by one."""
    rng = np.random.default_rng(seed)
    lines = [rng.integers(1, VOCABULARY - 1, n).tolist() for n in (4, 3, 1)]
    tokens, mask = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool)
    for row, line in enumerate(lines):
        slots = slice(0, len(line)) if padding == "right" else slice(LENGTH - len(line), LENGTH)
        tokens[row, slots], mask[row, slots] = line, True
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}, lines


class Odds:
    """Log-probabilities of the next token after any tokens, from the model's definition."""

    def __init__(self, params):
        self.params = {name: np.asarray(value, np.float64) for name, value in params.items()}
        self.known = {(): np.zeros(TOY.width)}

    def state(self, tokens):
        if tokens not in self.known:
            before = self.state(tokens[:-1]) @ self.params["turn"]
            self.known[tokens] = np.tanh(before + self.params["embed"][tokens[-1]])
        return self.known[tokens]

    def __call__(self, tokens):
        logits = self.state(tuple(tokens)) @ self.params["head"]
        return logits - np.log(np.exp(logits).sum())


def naive_ban(history, size):
    """Tokens that would repeat an n-gram, found by listing all n-grams."""
    seen = {tuple(history[i : i + size]) for i in range(len(history) - size + 1)}
    tail = history[len(history) - size + 1 :] if size > 1 else []
    return {token for token in range(VOCABULARY) if (*tail, token) in seen}


def naive_beam_search(odds, prompt, settings, ends, with_prompt=True):
    """One prompt, in lists: the rule of `beam_search._beam_search`."""
    live, ended = [((), 0.0)], []
    for count in range(1, settings.new_tokens + 1):
        candidates = []
        for tokens, total in live:
            history = [*(prompt if with_prompt else []), *tokens]
            banned = (
                naive_ban(history, settings.no_repeat_ngram)
                if (settings.no_repeat_ngram and len(history) >= settings.no_repeat_ngram)
                else set()
            )
            each = odds([*prompt, *tokens])
            candidates += [
                ((*tokens, token), total + each[token])
                for token in range(VOCABULARY)
                if token not in banned
            ]
        candidates.sort(key=lambda candidate: -candidate[1])
        for tokens, total in candidates[: settings.beams]:
            if tokens[-1] in ends:
                ended.append((total / count**settings.length_penalty, tokens))
        live = [c for c in candidates if c[0][-1] not in ends][: settings.beams]
    ended += [(total / settings.new_tokens**settings.length_penalty, t) for t, total in live]
    return max(ended)


@functools.cache
def compiled(settings, ends=(END,), with_prompt=True):
    return jax.jit(make_generator(TOY, settings, ends, PAD, prompt_ngrams=with_prompt))


def run(settings, params, batch, ends=(END,), with_prompt=True):
    found = compiled(settings, ends, with_prompt)(params, batch)
    texts = []
    for row in np.asarray(found.tokens).tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        assert row[stop:] == [PAD] * (len(row) - stop)
        texts.append(tuple(row[:stop]))
    return texts, np.asarray(found.scores)


@pytest.mark.parametrize("ngram", [0, 2])
def test_greedy_takes_the_likeliest_token(ngram):
    settings = GenerationSettings(7, beams=1, no_repeat_ngram=ngram)
    for seed in range(3):
        params = TOY.init(seed)
        batch, lines = prompts(seed)
        texts, scores = run(settings, params, batch)
        odds = Odds(params)
        for line, text, score in zip(lines, texts, scores, strict=True):
            expected, total = [], 0.0
            while len(expected) < 7 and END not in expected:
                each = odds([*line, *expected])
                if ngram:
                    each[list(naive_ban([*line, *expected], ngram))] = -np.inf
                expected.append(int(each.argmax()))
                total += each.max()
            assert text == tuple(expected)
            np.testing.assert_allclose(score, total, rtol=1e-4)


@pytest.mark.parametrize("penalty", [0.9, -1.0])
def test_enough_beams_find_the_best_of_all_texts(penalty):
    settings = GenerationSettings(4, beams=VOCABULARY**3, no_repeat_ngram=0, length_penalty=penalty)
    for seed in range(2):
        params = TOY.init(seed)
        batch, lines = prompts(seed)
        texts, scores = run(settings, params, batch)
        odds = Odds(params)
        for line, text, score in zip(lines, texts, scores, strict=True):
            every = {
                tokens[: tokens.index(END) + 1] if END in tokens else tokens
                for tokens in itertools.product(range(VOCABULARY), repeat=4)
            }
            assert len(every) == sum(5**n for n in range(4)) + 5**4

            def score_of(tokens, line=line, odds=odds):
                total = sum(odds([*line, *tokens[:i]])[token] for i, token in enumerate(tokens))
                return total / len(tokens) ** penalty

            best = max(every, key=score_of)
            assert text == best
            np.testing.assert_allclose(score, score_of(best), rtol=1e-4)


@pytest.mark.parametrize(
    ("beams", "ngram", "penalty", "ends", "with_prompt"),
    [
        (2, 0, 0.9, (END,), True),
        (3, 2, 0.9, (END,), True),
        (3, 2, 1.5, (END, 4), True),
        (4, 3, -0.5, (END,), False),
        (3, 1, 0.9, (END,), True),
        (3, 0, 0.9, (), True),
    ],
)
def test_beam_search_is_the_one_by_hand(beams, ngram, penalty, ends, with_prompt):
    settings = GenerationSettings(6, beams, ngram, penalty)
    for seed in range(3):
        params = TOY.init(seed)
        batch, lines = prompts(seed)
        texts, scores = run(settings, params, batch, ends, with_prompt)
        odds = Odds(params)
        for line, text, score in zip(lines, texts, scores, strict=True):
            expected, tokens = naive_beam_search(odds, line, settings, ends, with_prompt)
            assert text == tokens
            np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-6)


def test_one_beam_is_greedy():
    """Without a length penalty nothing can follow an end that is the likeliest token."""
    settings = GenerationSettings(6, beams=1, no_repeat_ngram=2, length_penalty=0.0)

    @jax.jit
    def with_one_beam(params, batch):
        logits, cache = TOY.prefill(params, batch, 5)
        before = jnp.where(batch["mask"], batch["tokens"], -1)
        search = _Search(TOY, params, settings, before=before, ends=jnp.asarray([END]), pad=PAD)
        return _beam_search(search, logits, cache)

    for seed in range(5):
        params = TOY.init(seed)
        batch, _ = prompts(seed, "left")
        greedy, beam = compiled(settings)(params, batch), with_one_beam(params, batch)
        assert np.array_equal(greedy.tokens, beam.tokens)
        np.testing.assert_allclose(greedy.scores, beam.scores, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_side_of_the_padding_does_not_matter(beams):
    settings = GenerationSettings(6, beams=beams, no_repeat_ngram=2)
    params = TOY.init(1)
    (right, _), (left, _) = prompts(1), prompts(1, "left")
    assert run(settings, params, right)[0] == run(settings, params, left)[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_banned_tokens_are_those_that_would_repeat(size):
    rng = np.random.default_rng(size)
    history = np.full((20, 9), -1, np.int32)
    for row in range(20):
        length = rng.integers(0, 10)
        history[row, 9 - length :] = rng.integers(0, 3, length)
    scores = jnp.asarray(rng.normal(size=(20, VOCABULARY)), jnp.float32)
    ban = jax.jit(ban_repeated_ngrams, static_argnums=2)
    ours = np.asarray(ban(scores, jnp.asarray(history), size))
    for row in range(20):
        real = [token for token in history[row].tolist() if token >= 0]
        banned = naive_ban(real, size) if len(real) >= size else set()
        assert set(np.flatnonzero(np.isneginf(ours[row])).tolist()) == banned
        kept = sorted(set(range(VOCABULARY)) - banned)
        assert np.array_equal(ours[row, kept], np.asarray(scores)[row, kept])
    short = jnp.zeros((20, size - 1), jnp.int32)
    assert ban_repeated_ngrams(scores, short, size) is scores


@pytest.mark.parametrize("beams", [1, 2])
def test_a_single_token_needs_no_step(beams):
    params = TOY.init(0)
    batch, lines = prompts()
    texts, _ = run(GenerationSettings(1, beams=beams), params, batch)
    assert texts == [(int(Odds(params)(line).argmax()),) for line in lines]


@pytest.mark.parametrize("beams", [1, 3])
def test_broken_models_end_too(beams):
    params = TOY.init(0)
    params["head"] = params["head"] * jnp.nan
    found = compiled(GenerationSettings(6, beams, no_repeat_ngram=2))(params, prompts()[0])
    assert found.tokens.shape == (ROWS, 6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"new_tokens": 0}, "new_tokens = 0: allowed is 1 or more"),
        ({"beams": 0}, "beams = 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram = -1: allowed is 0 or more"),
    ],
)
def test_settings_have_ranges(settings, says):
    with pytest.raises(ValueError, match=says):
        GenerationSettings(**settings)
