"""Tokenizers that fit a model, and those that do not."""

import numpy as np
import pytest
from locations import SHARED_DATA
from text_cases import MARKS, WORDS, ids, tiny_tokenizer, write_tokenizer
from tokenizers import Tokenizer, models

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.text.tokenization import load_tokenizer

SHARED = SHARED_DATA
START, END = 1, 2
VOCABULARY = len(MARKS) + len(WORDS)


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    file = write_tokenizer(tmp_path)
    directory = tmp_path
    assert load_tokenizer(directory, VOCABULARY, 64, 0, (END,)).file == file
    assert load_tokenizer(file, VOCABULARY + 1, None).ends == ()
    message = refusal(load_tokenizer, directory, VOCABULARY - 1, 64)
    assert message.startswith(f"{file}: token ')' has the id {VOCABULARY - 1}, but")
    assert f"has {VOCABULARY} tokens, but" in refusal(load_tokenizer, directory, 100, 64)
    assert "no token 30" in refusal(load_tokenizer, directory, VOCABULARY + 1, 64, 30)
    message = refusal(load_tokenizer, directory, VOCABULARY, 64, 0, (4,))
    assert "token 4, the eos_token_id in the model's config.json, is the ordinary 'good'" in message


@pytest.mark.parametrize(
    ("model", "count", "vocabulary", "fits"),
    [
        ("T5, padded", 32_100, 32_128, "yes"),
        ("Qwen2 7B, padded and reserved", 151_646, 152_064, "yes"),
        ("Qwen2 0.5B", 151_646, 151_936, "yes"),
        ("DeepSeek-Coder", 32_022, 32_256, "yes"),
        ("small, padded to 64", 300, 320, "yes"),
        ("middling", 2_000, 2_064, "no"),
        ("DeepSeek-LLM", 100_015, 102_400, "perhaps"),
        ("BERT, cased for uncased", 28_996, 30_522, "no"),
        ("tiny, hardly padded", 30, 64, "no"),
    ],
)
def test_sizes_of_known_vocabularies(tmp_path, model, count, vocabulary, fits):
    words = {f"w{number}": number for number in range(count)}
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(file))
    if fits == "no":
        message = refusal(load_tokenizer, file, vocabulary, None)
        assert message.endswith("it belongs to another model"), model
        return
    note = load_tokenizer(file, vocabulary, None).note
    if fits == "perhaps":
        assert note.startswith(f"{file}: it has {count} tokens, but the model's vocabulary ")
        assert note.endswith("make sure that it belongs to this model")
        assert "\n" not in note
    else:
        assert note == "", model


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 1}'])
def test_damaged_tokenizers_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    assert refusal(load_tokenizer, tmp_path, 9, 9).startswith(f"{tmp_path}/tokenizer.json: ")


def test_decoding_stops_at_the_end(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tokens = [START, *ids("a good film"), END, *ids("bad"), 0]
    assert tokenizer.decode(np.asarray(tokens)) == "a good film"
