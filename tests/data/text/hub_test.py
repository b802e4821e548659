"""The hub's data sets as rows: from a directory that the library datasets has saved."""

import sys

import datasets
import numpy as np
import pytest
from text_cases import tiny_tokenizer

from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.data.text.formats import own_format
from fedqsn_jax.data.text.loading import TextSettings, _test_source, text_format
from fedqsn_jax.data.text.packing import CLIENT_COLUMN, PackingOptions, pack
from fedqsn_jax.data.text.sources import open_source

ROWS = {
    "sentence": ["good", "bad", "fine", "poor"],
    "label": [1, 0, 1, 0],
    "speaker": ["b", "a", "b", "c"],
}


@pytest.fixture
def saved(tmp_path):
    features = datasets.Features({
        "sentence": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["negative", "positive"]),
        "speaker": datasets.Value("string"),
    })  # fmt: skip
    whole = datasets.Dataset.from_dict(ROWS, features=features)
    splits = datasets.DatasetDict({"train": whole, "validation": whole.select([3])})
    splits.save_to_disk(str(tmp_path / "saved"))
    whole.save_to_disk(str(tmp_path / "alone"))
    return tmp_path


def values(spec, **more):
    return [row.values for row in open_source(spec, **more).rows()]


def test_rows_of_a_saved_data_set(saved):
    rows = values(f"hf:{saved / 'saved'}")
    assert rows[0] == {"sentence": "good", "label": 1, "speaker": "b"}
    assert [row["label"] for row in rows] == [1, 0, 1, 0], "class labels stay integers"
    assert len(values(f"hf:{saved / 'saved'}:validation")) == 1
    assert len(values(f"hf:{saved / 'saved'}", split="validation")) == 1
    # One that was saved without splits is the same under any.
    assert values(f"hf:{saved / 'alone'}") == rows
    digests = {
        open_source(f"hf:{saved / 'saved'}:{split}").digest() for split in ("train", "validation")
    }
    assert len(digests) == 2


def test_files_in_a_directory(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text(
        '{"text": "a", "who": 7}\n{"text": "b", "who": 8}\n'
    )
    assert values(f"hf:{tmp_path / 'rows'}") == [{"text": "a", "who": 7}, {"text": "b", "who": 8}]


def test_another_column_may_say_whose_a_row_is(saved, tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    rows = list(open_source(f"hf:{saved / 'saved'}").rows())
    kind = own_format(("sentence",), "label", 8, ("negative", "positive"))
    named = pack(rows, kind, tokenizer, PackingOptions(8, client_column="speaker"))
    np.testing.assert_array_equal(named.arrays[CLIENT_COLUMN], ["b", "a", "b", "c"])
    assert CLIENT_COLUMN not in pack(rows, kind, tokenizer, PackingOptions(8)).arrays
    rows[1].values.pop("speaker")
    with pytest.raises(ConfigError, match=r"train:2: no value in 'speaker', which other rows have"):
        pack(rows, kind, tokenizer, PackingOptions(8, client_column="speaker"))


def test_mistakes_are_told_in_a_line(saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for spec, told in (
        (f"hf:{saved / 'saved'}:test", "there is no split 'test'; allowed are train, validation"),
        ("hf:nobody/has-such-a-set", "without a network name a directory"),
        ("hf:", "allowed are tsv:..."),
    ):
        with pytest.raises(ConfigError) as error:
            open_source(spec)
        assert told in str(error.value)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedqsn_jax\[hub\]'"):
        open_source(f"hf:{saved / 'saved'}")


def test_the_test_split_is_taken_of_the_same_data_set(saved):
    settings = TextSettings("sst2", f"hf:{saved / 'saved'}")
    source = _test_source(settings, DataConfig(), text_format(settings))
    assert [row.values["sentence"] for row in source.rows()] == ["poor"]
