"""Sources of text: files, TFDS, and what is told of bad ones."""

from pathlib import Path

import numpy as np
import pytest
from locations import SHARED_DATA

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.text.formats import (
    FORMATS,
    classification_example,
    generation_example,
)
from fedqsn_jax.data.text.sources import open_source

SHARED = SHARED_DATA


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"{path.suffix[1:]}:{path}"


def rows(spec: str, **where):
    return [row.values for row in open_source(spec, **where).rows()]


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tsv_skips_the_mark_and_keeps_quotes(tmp_path):
    content = 'Quality\t#1 String\r\n1\tsaid " the witness \r\n\r\n0\tnaïve\x85\u2028x\n'
    spec = write(tmp_path / "a.tsv", b"\xef\xbb\xbf" + content.encode())
    assert rows(spec) == [
        {"Quality": "1", "#1 String": 'said " the witness '},
        {"Quality": "0", "#1 String": "naïve\x85\u2028x"},
    ]


def test_jsonl_keeps_types(tmp_path):
    spec = write(tmp_path / "a.jsonl", '{"text": "a\\nb", "label": 1}\n\n{"text": ["x"]}\n')
    assert rows(spec) == [{"text": "a\nb", "label": 1}, {"text": ["x"]}]


def test_e2e_has_two_columns(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("name : Blue Spice | Type : pub||The Blue Spice || a pub . \n")
    assert rows(f"e2e:{path}") == [
        {
            "meaning_representation": "name : Blue Spice | Type : pub",
            "human_reference": "The Blue Spice || a pub .",
        }
    ]


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.tsv", "text\tlabel\nx\t1\ny\n", 3, "no field 'label'"),
        ("a.tsv", "text\tlabel\nx\t1\t2\n", 2, "field 2, 'label'"),
        ("a.tsv", "text\ttext\nx\t1\n", 1, "twice"),
        ("a.tsv", b"text\tlabel\nx\t1\n\xff\t1\n", 3, "not UTF-8 at byte 1"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', 2, "not JSON"),
        ("a.jsonl", "[1]\n", 1, "JSON object"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 10**5 + "\n", 2, "nested too deeply"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": ' + "9" * 5000 + "}\n",
            2,
            "a number of more than 4300 digits",
        ),
        ("a.jsonl", '{"a": "x\0"}\n', 1, "not JSON"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), 1, "not UTF-8 at byte 1"),
        ("a.e2e", "name : x|no bars\n", 1, "'human_reference'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, content, line, says):
    spec = write(tmp_path / name, content)
    message = refusal(rows, spec)
    assert message.startswith(f"{tmp_path / name}:{line}: ")
    assert says in message


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_system_ends_them(tmp_path, end):
    lines = ["text\tlabel", "x\t1", "", "y\t0", ""]
    found = open_source(write(tmp_path / "a.tsv", "\ufeff" + end.join(lines))).rows()
    assert [(row.values["text"], row.where.rpartition(":")[2]) for row in found] == [
        ("x", "2"),
        ("y", "4"),
    ]
    spec = write(tmp_path / "a.jsonl", end.join(['{"a": 1}', '{"a":', ""]))
    assert f"{tmp_path / 'a.jsonl'}:2: not JSON" in refusal(rows, spec)


def test_a_carriage_return_within_a_line_ends_nothing(tmp_path):
    assert rows(write(tmp_path / "a.tsv", "text\nx\ry\n")) == [{"text": "x\ry"}]


@pytest.mark.parametrize("content", ["", "text\tlabel\n", "\n\n"])
def test_an_empty_file_is_named(tmp_path, content):
    assert refusal(rows, write(tmp_path / "a.tsv", content)) == f"{tmp_path}/a.tsv: it has no rows"


def test_unknown_sources_are_refused(tmp_path):
    assert "allowed are tsv:..., jsonl:..." in refusal(open_source, "csv:a.csv")
    assert "does not exist" in refusal(open_source, f"tsv:{tmp_path}/none.tsv")
    assert "is a directory" in refusal(open_source, f"tsv:{tmp_path}")
    message = refusal(open_source, "tfds:glue/rte", str(tmp_path))
    assert message.startswith(f"data source 'tfds:glue/rte': not found in {tmp_path}/glue/rte;")
    assert "tfds build glue/rte" in message


def test_the_digest_follows_the_content(tmp_path):
    spec = write(tmp_path / "a.tsv", "text\nx\n")
    first = open_source(spec).digest()
    assert open_source(spec).digest() == first
    write(tmp_path / "a.tsv", "text\ny\n")
    assert open_source(spec).digest() != first


def write_tfds(root: Path, folder: str, features, examples) -> None:
    """Writes a set as TFDS lays it out, without TensorFlow; ``examples`` by split."""
    import tensorflow_datasets as tfds

    directory = root / folder / "1.0.0"
    directory.mkdir(parents=True)
    name, _, config = folder.partition("/")
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name="tests",
        config_name=config or None,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, 2, file_format="array_record")
    writer.initialize_splits(list(examples))
    for split, some in examples.items():
        writer.add_examples({split: some})
    writer.close_all()


def test_glue_is_read_from_tfds(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "sentence1": tfds.features.Text(),
            "sentence2": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["entailment", "not_entailment"]),
            "idx": np.int32,
        }
    )

    def example(number):
        return {
            "sentence1": f"naïve {number}",
            "sentence2": "b",
            "label": number % 2,
            "idx": number,
        }

    splits = {"train": [example(n) for n in range(5)], "validation": [example(9)]}
    write_tfds(tmp_path, "glue/rte", features, splits)
    source = open_source("tfds:glue/rte", str(tmp_path))
    assert [classification_example(row, FORMATS["rte"]) for row in source.rows()] == [
        ((f"naïve {n}", "b"), n % 2) for n in range(5)
    ]
    assert [row.where for row in source.rows()][-1] == "glue/rte train:5"
    (held_out,) = rows("tfds:glue/rte:validation", directory=str(tmp_path))
    assert held_out["idx"] == 9
    message = refusal(rows, "tfds:glue/rte:test", directory=str(tmp_path))
    assert "no split 'test'; allowed are train, validation" in message


@pytest.mark.parametrize(
    ("task", "cells", "prompt"),
    [
        (
            "e2e",
            [("name", 1, "Blue Spice"), ("eatType", 1, "pub")],
            "name: Blue Spice | Type: pub\nOutput: ",
        ),
        (
            "dart",
            [
                ("subject", 0, "Mars"),
                ("predicate", 0, "IS"),
                ("object", 0, "red"),
                ("subject", 1, "Mars"),
                ("predicate", 1, "HAS"),
                ("object", 1, "moons"),
            ],
            "(Mars | IS | red), (Mars | HAS | moons)\nOutput: ",
        ),
    ],
)
def test_tables_are_read_from_tfds(tmp_path, task, cells, prompt):
    import tensorflow_datasets as tfds

    table = tfds.features.Sequence(
        {"column_header": np.str_, "row_number": np.int16, "content": np.str_}
    )
    features = tfds.features.FeaturesDict({"input_text": {"table": table}, "target_text": np.str_})
    example = {
        "input_text": {
            "table": [
                {"column_header": header, "row_number": number, "content": content}
                for header, number, content in cells
            ]
        },
        "target_text": "some text",
    }
    write_tfds(tmp_path, task, features, {"test": [example]})
    (row,) = open_source(f"tfds:{task}", str(tmp_path), "test").rows()
    assert generation_example(row, FORMATS[task]) == (prompt, "some text")
