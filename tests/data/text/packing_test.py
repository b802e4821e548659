"""Rows and prompts as arrays: a tiny tokenizer, and rows packed by hand."""

import numpy as np
import pytest
from locations import SHARED_DATA
from text_cases import MARKS, WORDS, ids, tiny_tokenizer

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.text.formats import FORMATS
from fedqsn_jax.data.text.packing import PackingOptions, pack
from fedqsn_jax.data.text.prompts import make_prompts
from fedqsn_jax.data.text.sources import Row

SHARED = SHARED_DATA
START, END = 1, 2
VOCABULARY = len(MARKS) + len(WORDS)


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def rows(*values):
    return [Row(each, f"file:{number}") for number, each in enumerate(values, 1)]


def padded(length, *lines):
    return [line + [0] * (length - len(line)) for line in lines]


SST2 = rows(
    {"sentence": "good film", "label": "1"}, {"sentence": "the food is not good .", "label": "0"}
)
E2E = rows(
    {"mr": "name[Blue Spice], eatType[pub]", "ref": "Blue Spice is a pub ."},
    {"mr": "name[Blue Spice]", "ref": "a pub"},
)
PROMPTS = ["name : Blue Spice | Type : pub Output :", "name : Blue Spice Output :"]


def test_single_texts(tmp_path):
    packed = pack(SST2, FORMATS["sst2"], tiny_tokenizer(tmp_path), PackingOptions(6))
    tokens = padded(6, [START, *ids("good film"), END], [START, *ids("the food is not"), END])
    assert packed.arrays["tokens"].tolist() == tokens
    assert packed.arrays["mask"].sum(axis=1).tolist() == [4, 6]
    assert packed.arrays["mask"][0].tolist() == [True] * 4 + [False] * 2
    assert packed.arrays["label"].tolist() == [1, 0]
    assert packed.cut.sum() == 1
    dtypes = {name: array.dtype for name, array in packed.arrays.items()}
    assert dtypes == {"tokens": np.int32, "mask": np.bool_, "label": np.int32}


def test_pairs_are_cut_at_the_longer_text(tmp_path):
    some = rows(
        {"sentence1": "the film is good", "sentence2": "bad", "label": "entailment"},
        {"sentence1": "a film", "sentence2": "the", "label": "not_entailment"},
    )
    packed = pack(some, FORMATS["rte"], tiny_tokenizer(tmp_path), PackingOptions(7))
    assert packed.arrays["tokens"].tolist() == padded(
        7,
        [START, *ids("the film is"), END, *ids("bad"), END],
        [START, *ids("a film"), END, *ids("the"), END],
    )
    assert packed.arrays["token_types"].tolist() == [[0] * 5 + [1] * 2, [0] * 4 + [1] * 2 + [0]]
    assert packed.cut.sum() == 1


def test_decoders_are_trained_on_completions_only(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, "none")
    packed = pack(E2E, FORMATS["e2e"], tokenizer, PackingOptions(20))
    prompts = [[*ids(prompt), END] for prompt in PROMPTS]
    completions = [[*ids("Blue Spice is a pub ."), END], [*ids("a pub"), END]]
    assert packed.arrays["tokens"].tolist() == padded(
        20, *(p + c for p, c in zip(prompts, completions, strict=True))
    )
    assert packed.arrays["loss_mask"].tolist() == [
        [False] * len(p) + [True] * len(c) + [False] * (20 - len(p) - len(c))
        for p, c in zip(prompts, completions, strict=True)
    ]
    assert set(packed.arrays) == {"tokens", "mask", "loss_mask"}
    short = pack(E2E, FORMATS["e2e"], tokenizer, PackingOptions(12, separator=False))
    expected = (ids(PROMPTS[0]) + completions[0])[:12]
    assert short.arrays["tokens"][0].tolist() == expected
    assert short.arrays["loss_mask"][0].tolist() == [False] * 10 + [True] * 2
    assert short.cut.sum() == 1


def test_encoder_decoders_get_both_halves(tmp_path):
    options = PackingOptions(12, target_length=4, encoder_decoder=True)
    packed = pack(E2E, FORMATS["e2e"], tiny_tokenizer(tmp_path), options)
    assert packed.arrays["tokens"].tolist() == padded(
        12, *([START, *ids(prompt), END] for prompt in PROMPTS)
    )
    assert packed.arrays["target_tokens"].tolist() == padded(
        4, ids("Blue Spice is a"), [*ids("a pub"), END]
    )
    assert packed.arrays["target_mask"].tolist() == [[True] * 4, [True] * 3 + [False]]
    assert packed.cut.sum() == 1


@pytest.mark.parametrize(
    ("some", "task", "options", "says"),
    [
        (SST2, "sst2", PackingOptions(6), "file:2: sentence: 8 tokens, allowed are 6"),
        (E2E, "e2e", PackingOptions(12), "file:1: mr, ref: 18 tokens, allowed are 12"),
        (E2E, "e2e", PackingOptions(8, encoder_decoder=True), "file:1: mr, ref: 10 tok"),
    ],
)
def test_long_rows_are_refused_where_asked(tmp_path, some, task, options, says):
    tokenizer = tiny_tokenizer(tmp_path, "none")
    if task == "sst2":
        tokenizer = tiny_tokenizer(tmp_path)
    message = refusal(pack, some, FORMATS[task], tokenizer, options._replace(truncate=False))
    assert message.startswith(says)
    assert message.endswith("(data.length)")


def test_progress_counts_every_row(tmp_path):
    done = []
    many = rows(*({"sentence": "good", "label": 1} for _ in range(1500)))
    pack(many, FORMATS["sst2"], tiny_tokenizer(tmp_path), PackingOptions(4), done.append)
    assert done == [1024, 476]


def test_clients_of_their_own(tmp_path):
    kind, tokenizer, options = FORMATS["sst2"], tiny_tokenizer(tmp_path), PackingOptions(4)

    def clients(*names):
        some = rows(*({"sentence": "good", "label": 1, "client_id": name} for name in names))
        return pack(some, kind, tokenizer, options).arrays["client_id"].tolist()

    assert clients("b", "a") == ["b", "a"]
    assert clients(10, 2) == [10, 2]
    assert clients(10, "x") == ["10", "x"]
    assert clients(2**63 + 1, 5) == ["9223372036854775809", "5"]
    assert clients(1, "1", 1.0) == ["1"] * 3
    for missing in ("", None, float("nan")):
        assert "file:2: no value in 'client_id'" in refusal(clients, "b", missing)
    for wrong in ([1], {}, float("inf"), "a\0", "\ud800"):
        assert refusal(clients, "b", wrong).startswith("file:2: client_id: ")


def test_prompts_have_all_their_references(tmp_path):
    some = [
        *E2E,
        *rows({"mr": "name[Blue Spice], eatType[pub]", "ref": "the Blue Spice pub"}),
    ]
    tokenizer = tiny_tokenizer(tmp_path, "none")
    prompts = make_prompts(some, FORMATS["e2e"], tokenizer, PackingOptions(8), 16)
    assert prompts.references == [["Blue Spice is a pub .", "the Blue Spice pub"], ["a pub"]]
    assert prompts.tokens.tolist() == padded(11, *([*ids(prompt), END] for prompt in PROMPTS))
    assert prompts.mask.sum(axis=1).tolist() == [11, 7]
    assert prompts.texts[1] == "name: Blue Spice\nOutput: "


def test_prompts_leave_room_for_new_tokens(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, "none", max_length=20)
    arguments = (E2E, FORMATS["e2e"], tokenizer)
    cut = make_prompts(*arguments, PackingOptions(8), 14).tokens
    assert cut.tolist() == [[*ids(PROMPTS[0])[:5], END], [*ids(PROMPTS[1])[:5], END]]
    message = refusal(make_prompts, *arguments, PackingOptions(8, truncate=False), 14)
    assert message.startswith("file:1: mr: a prompt of 11 tokens, allowed are 6")
    assert "20 positions" in refusal(make_prompts, *arguments, PackingOptions(8), 20)
