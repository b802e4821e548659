"""BLEU and ROUGE-L by hand, and texts from prompts to scores."""

import jax.numpy as jnp
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from text_cases import ids, tiny_tokenizer

from fedqsn_jax.data.text.prompts import Prompts
from fedqsn_jax.generation.beam_search import Generated
from fedqsn_jax.generation.scores import bleu, rouge_l
from fedqsn_jax.generation.text_evaluation import make_text_evaluator
from fedqsn_jax.generation.words import words_of


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


SAME = {
    "Chinese": "今天天气很好。",
    "Russian": "Мама мыла раму и пол.",
    "Hindi": "आज मौसम बहुत अच्छा है।",
    "Japanese": "今日はとても良い天気です。",
    "Korean": "오늘 날씨가 아주 좋습니다.",
    "Thai": "วันนี้อากาศดีมาก",
    "Arabic": "الطقس جميل جدا اليوم.",
    "Greek": "Καλημέρα, η μέρα είναι πολύ καλή σήμερα.",
    "Hebrew": "מזג האוויר היום טוב מאוד",
    "mixed": "我的 iPhone 很 old 啊",
    "accents": "é à ô ü",
    "emoji": "😀 😁 😂 🤣",
    "Braille": "⠓⠑ ⠇⠇ ⠕ ⠺",
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_equal_texts_score_100_in_every_script(text):
    assert rouge_l([text], [[text]]) == pytest.approx(100)
    assert bleu([text], [[text]]) == pytest.approx(100)
    assert rouge_l([text], [["something else"]]) == 0


def test_rouge_l_of_other_scripts_by_hand():
    # 4 of 5 characters against 4 of 4; and 2 of 3 words against 2 of 4, whatever their case.
    assert rouge_l(["天气不很好"], [["天气很好"]]) == pytest.approx(100 * 2 * 0.8 / 1.8)
    one = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert rouge_l(["Мама мыла пол."], [["мама, МЫЛА раму вчера"]]) == pytest.approx(100 * one)
    # A consonant and the marks above and below it are one character.
    assert words_of("ที่นี่", str.split) == ["ที่", "นี่"]
    assert words_of("कि हिन्दी", str.split) == ["कि", "हिन्दी"]
    # Composed and decomposed letters are the same: й.
    assert rouge_l(["мой"], [["мо\u0438\u0306"]]) == pytest.approx(100)


def test_bleu_of_chinese_is_that_of_sacrebleus_own_tokenization():
    texts = ["今天天气很好,我们去公园。", "他喜欢 Python 和数学。"]
    references = [["今天天气不错,我们去公园吧。"], ["他很喜欢 Python 和音乐。"]]
    expected = BLEU(tokenize="zh").corpus_score(texts, [[some[0] for some in references]]).score
    assert 10 < expected < 90
    assert bleu(texts, references) == pytest.approx(expected)


def test_scores_of_latin_texts_are_those_of_the_libraries():
    pairs = {
        "The café isn't bad - 5 of 10 stars!": "A café that's not bad: 5/10 stars.",
        "Größe, naïveté; e.g. $3.50": "Größe and naïveté, e.g. $3.50",
        "5 µm² or 3 K, 2ª": "5 m2 or 3 l, 2a",
        "": "a b",
        "!?": "!?",
    }
    texts, references = list(pairs), [[one] for one in pairs.values()]
    plain = RougeScorer(["rougeL"])
    for text, (reference,) in zip(texts, references, strict=True):
        expected = 100 * plain.score(reference, text)["rougeL"].fmeasure
        assert rouge_l([text], [[reference]]) == expected
    expected = BLEU(force=True).corpus_score(texts, [[some[0] for some in references]]).score
    assert bleu(texts, references) == expected


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
