"""BLEU and ROUGE-L by hand, and texts from prompts to scores."""

import jax.numpy as jnp
import numpy as np
import pytest
from text_cases import ids, tiny_tokenizer

from fedqsn_jax.data.text.prompts import Prompts
from fedqsn_jax.generation.beam_search import Generated
from fedqsn_jax.generation.scores import bleu, rouge_l
from fedqsn_jax.generation.text_evaluation import make_text_evaluator


def test_bleu_by_hand():
    """n-grams of both texts pooled, each clipped by its best reference; closest length."""
    texts = ["the cat sat on the mat", "a b c d"]
    references = [["the cat sat on the mat"], ["a b c d e", "x"]]
    # Every n-gram is found; 10 words against 6 + 5 of the closest references.
    assert bleu(texts, references) == pytest.approx(100 * np.exp(1 - 11 / 10))
    # The second reference has the text's own length, so there is no penalty; its n-grams add up.
    assert bleu(texts, [references[0], ["a b c d e", "w x y z"]]) == pytest.approx(100)


def test_bleu_of_partial_matches_by_hand():
    # Of 5 words 4 match, of 4 pairs 2, of 3 triples 1; of 2 quadruples none, smoothed to 1/2.
    score = bleu(["a b c x d"], [["a b c d y"]])
    assert score == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * (1 / 2) / 2) ** 0.25)


def test_rouge_l_by_hand():
    # Longest common subsequence "a b d": precision 3/4, recall 3/5; the other reference has 1/4.
    one = 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)
    texts, references = ["a b c d"], [["a b x d y", "z z z d"]]
    assert rouge_l(texts, references) == pytest.approx(100 * one)
    assert rouge_l(texts * 2, [*references, ["q"]]) == pytest.approx(100 * one / 2)


@pytest.mark.parametrize("score", [bleu, rouge_l])
def test_the_best_reference_counts(score):
    assert score(["the food is good"], [["bad", "the food is good"]]) == pytest.approx(100)
    assert score([""], [["a pub"]]) == 0


@pytest.mark.parametrize("score", [bleu, rouge_l])
@pytest.mark.parametrize(
    ("texts", "references", "says"),
    [
        ([], [], "no texts"),
        (["a"], [], "1 texts, but references of 0 inputs"),
        (["a", "b"], [["a"], []], "input 1 has no reference"),
    ],
)
def test_impossible_arguments(score, texts, references, says):
    with pytest.raises(ValueError, match=says):
        score(texts, references)


def test_prompts_become_scores(tmp_path):
    """A model that repeats its prompt and adds a constant word; 5 prompts in batches of 2."""
    tokenizer = tiny_tokenizer(tmp_path, "none")
    lines = ["good", "bad film", "the pub", "a film", "food"]
    tokens, mask = np.zeros((5, 2), np.int32), np.zeros((5, 2), bool)
    for row, line in enumerate(lines):
        tokens[row, : len(ids(line))] = ids(line)
        mask[row, : len(ids(line))] = True
    references = [[f"{line} pub"] for line in lines]
    prompts = Prompts(tokens, mask, lines, references)
    shapes, done = [], []

    def generate(params, batch):
        shapes.append(batch["tokens"].shape)
        rows, length = batch["tokens"].shape
        count = batch["mask"].sum(axis=1)
        out = jnp.zeros((rows, length + 3), jnp.int32)
        out = out.at[:, :length].set(batch["tokens"])
        out = out.at[jnp.arange(rows), count].set(params["word"])
        out = out.at[jnp.arange(rows), count + 1].set(2)
        return Generated(out, jnp.zeros(rows))

    evaluate = make_text_evaluator(generate, tokenizer, prompts, 2, done.append)
    found = evaluate({"word": jnp.int32(ids("pub")[0])})
    assert found.texts == [f"{line} pub" for line in lines]
    assert found.metrics["rouge_l"] == pytest.approx(100)
    worse = evaluate({"word": jnp.int32(ids("cheap")[0])})
    assert worse.texts[1] == "bad film cheap"
    assert worse.metrics == {
        "bleu": bleu(worse.texts, references),
        "rouge_l": rouge_l(worse.texts, references),
    }
    # Compiled once, for one shape.
    assert shapes == [(2, 2)]
    assert done == [2, 2, 1] * 2
