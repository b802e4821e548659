"""Text sources and formats: tiny files with every trouble, TFDS sets made here, real files."""

from pathlib import Path

import numpy as np
import pytest
from locations import SHARED_DATA

from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.text.formats import (
    FORMATS,
    classification_example,
    generation_example,
    own_format,
)
from fedqsn_jax.data.text.sources import Row, open_source

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


def row_of(tmp_path, **values):
    import json

    (row,) = open_source(write(tmp_path / "row.jsonl", json.dumps(values))).rows()
    return row


@pytest.mark.parametrize(
    ("task", "values", "expected"),
    [
        ("sst2", {"sentence": "good", "label": "0"}, (("good",), 0)),
        ("sst2", {"sentence": "good", "label": "positive"}, (("good",), 1)),
        ("mrpc", {"#1 String": "a", "#2 String": "b", "Quality": "1"}, (("a", "b"), 1)),
        ("mrpc", {"sentence1": "a", "sentence2": "b", "label": 0}, (("a", "b"), 0)),
        ("qnli", {"question": "q", "sentence": "s", "label": "not_entailment"}, (("q", "s"), 1)),
        ("qqp", {"question1": "q", "question2": "s", "is_duplicate": 1}, (("q", "s"), 1)),
        ("mnli", {"premise": "p", "hypothesis": "h", "label": "contradiction"}, (("p", "h"), 2)),
    ],
)
def test_classification_formats(tmp_path, task, values, expected):
    assert classification_example(row_of(tmp_path, **values), FORMATS[task]) == expected


@pytest.mark.parametrize(
    ("task", "values", "prompt"),
    [
        (
            "e2e",
            {
                "meaning_representation": "name[The Eagle, bar], eatType[pub], priceRange[cheap]",
                "human_reference": "t",
            },
            "name: The Eagle, bar | Type: pub | price: cheap\nOutput: ",
        ),
        (
            "e2e",
            {"meaning_representation": "name : X | area : city centre", "human_reference": "t"},
            "name: X | area: city centre\nOutput: ",
        ),
        (
            "dart",
            {"tripleset": [["A", "B", "C"], ["D", "E", "F"]], "target": "t"},
            "(A | B | C), (D | E | F)\nOutput: ",
        ),
        (
            "viggo",
            {"meaning_representation": "inform(name[x])", "target": "t"},
            "inform(name[x])\nOutput: ",
        ),
        (
            "dialogsum",
            {"topic": "a trip", "dialogue": "#1: hi", "summary": "t"},
            "a trip | #1: hi\nOutput: ",
        ),
    ],
)
def test_generation_formats(tmp_path, task, values, prompt):
    assert generation_example(row_of(tmp_path, **values), FORMATS[task]) == (prompt, "t")


def test_lengths_are_the_papers():
    lengths = {name: kind.length for name, kind in FORMATS.items() if name != "running_text"}
    assert lengths == {
        "rte": 160,
        "sst2": 50,
        "mrpc": 80,
        "qqp": 60,
        "qnli": 90,
        "mnli": 128,
        "e2e": 128,
        "dart": 128,
        "viggo": 128,
        "dialogsum": 400,
    }
    assert [name for name, kind in FORMATS.items() if kind.f1] == ["mrpc", "qqp"]


def table(header, content):
    return {"table": {"column_header": [header], "content": [content], "row_number": [0]}}


@pytest.mark.parametrize(
    ("task", "values", "says"),
    [
        ("sst2", {"text": "x", "label": 1}, "no column 'sentence'; the row has 'text', 'label'"),
        ("sst2", {"sentence": None, "label": 1}, "no value in 'sentence'"),
        ("sst2", {"sentence": ["x"], "label": 1}, "sentence: needed is text, not a list"),
        ("sst2", {"sentence": float("nan"), "label": 1}, "no value in 'sentence'"),
        ("sst2", {"sentence": float("inf"), "label": 1}, "sentence: inf is no text"),
        ("sst2", {"sentence": "x\ud83d", "label": 1}, "sentence: '\\ud83d' is half of a character"),
        ("sst2", {"sentence": "x", "label": float("nan")}, "no value in 'label'"),
        ("sst2", {"sentence": "x", "label": ""}, "label = '': allowed are"),
        ("sst2", {"sentence": "x", "label": 0.5}, "label = 0.5: allowed are"),
        ("sst2", {"sentence": "x", "label": 2**64}, "label = 18446744073709551616: allowed"),
        ("sst2", {"sentence": "x", "label": "1" * 5000}, "label = '1111"),
        ("viggo", {"meaning_representation": "\udc00", "target": "t"}, "meaning_representation: "),
        ("e2e", {"mr": "name : \udc00", "ref": "t"}, "mr: '\\udc00' is half of a character"),
        ("e2e", {"mr": "name : x", "ref": "\udc00"}, "ref: '\\udc00' is half of a character"),
        ("e2e", {"mr": float("nan"), "ref": "t"}, "no value in"),
        ("sst2", {"sentence": "x", "label": 2}, "label = 2: allowed are 0 to 1, or negative, pos"),
        ("sst2", {"sentence": "x", "label": -1}, "label = -1: allowed are 0 to 1"),
        ("sst2", {"sentence": "x", "label": "good"}, "label = 'good'"),
        ("e2e", {"meaning_representation": "x", "ref": "t"}, "meaning_representation: 'x' is not"),
        ("dart", {"tripleset": 3, "target": "t"}, "tripleset: needed is a list of lists"),
        ("dart", {"tripleset": "abc", "target": "t"}, "tripleset: needed is a list of lists"),
        ("dart", {"tripleset": ["abc"], "target": "t"}, "tripleset: needed is a list of lists"),
        ("dart", {"tripleset": [["a", None]], "target": "t"}, "tripleset: a cell has no value"),
        ("dart", {"tripleset": [[float("nan")]], "target": "t"}, "tripleset: a cell has no value"),
        ("dart", {"tripleset": [["a", ["b"]]], "target": "t"}, "tripleset: needed is text, not"),
        ("dart", {"tripleset": {"table": {"content": []}}, "target": "t"}, "tripleset: needed is"),
        ("e2e", {"mr": ["a"], "ref": "t"}, "mr: needed is text or a table, not a list"),
        ("e2e", {"mr": {"x": 1}, "ref": "t"}, "mr: needed is a table: lists column_header"),
        ("e2e", {"mr": table("a", None), "ref": "t"}, "mr: a cell has no value"),
    ],
)
def test_bad_values_are_named(tmp_path, task, values, says):
    kind = FORMATS[task]
    message = refusal(
        generation_example if kind.generates else classification_example,
        row_of(tmp_path, **values),
        kind,
    )
    assert message.startswith(f"{tmp_path}/row.jsonl:1: {says}")


@pytest.mark.parametrize("value", [1, 1.0, True, "1", " 1 ", "positive"])
def test_a_label_may_be_written_in_many_ways(tmp_path, value):
    row = Row({"sentence": "x", "label": value}, "file:1")
    assert classification_example(row, FORMATS["sst2"])[1] == 1
    named = own_format(("sentence",), "label", 5, ("false", "true"))
    if value != "positive":
        assert classification_example(row, named)[1] == 1


def test_own_formats(tmp_path):
    stars = own_format(("review",), "stars", 32, labels=("1", "2", "3"))
    assert classification_example(row_of(tmp_path, review="x", stars=3), stars) == (("x",), 2)
    # A number that is no name is no position either.
    assert "stars = 0" in refusal(
        classification_example, row_of(tmp_path, review="x", stars=0), stars
    )
    asks = own_format(("q", "hint"), "answer", 32, template="Q: {q} ({hint})\nA: ")
    row = row_of(tmp_path, q="why", hint=4, answer="so")
    assert generation_example(row, asks) == ("Q: why (4)\nA: ", "so")
    plain = own_format(("q", "hint"), "answer", 32)
    assert generation_example(row, plain) == ("why | 4\nOutput: ", "so")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"columns": ()}, "data.columns"),
        ({"target": ""}, "data.columns"),
        ({"columns": ("a", "b", "c"), "labels": ("x", "y")}, "data.columns"),
        ({"labels": ("x",)}, "data.labels"),
        ({"labels": ("x", "x")}, "data.labels"),
        ({"template": "{a} {b}"}, "data.template"),
        ({"template": "{a"}, "data.template"),
        ({"columns": ("a", "a")}, "data.columns"),
        ({"columns": ("a", "t"), "labels": ("x", "y")}, "data.target"),
    ],
)
def test_bad_own_formats_are_refused(fields, field):
    given = {"columns": ("a",), "target": "t", "length": 8} | fields
    assert refusal(own_format, **given).startswith(field)


def test_a_template_for_more_than_memory_holds_is_a_line(tmp_path):
    huge = own_format(("a",), "t", 8, template="{a:>1000000000000000000}")
    message = refusal(generation_example, row_of(tmp_path, a="x", t="y"), huge)
    assert message.endswith("row.jsonl:1: a: its text is too long")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")
@pytest.mark.parametrize(
    ("task", "spec", "count"),
    [
        ("sst2", "tsv:sst2/test.tsv", 872),
        ("rte", "tsv:rte/train.tsv", 2490),
        ("mrpc", "tsv:mrpc/train.tsv", 3667),
        ("mrpc", "tsv:mrpc/dev.tsv", 408),
        ("qnli", "tsv:qnli/dev.tsv", 5463),
        ("e2e", "e2e:e2e/test.txt", 4693),
    ],
)
def test_real_files_are_understood(task, spec, count):
    kind, path = spec.split(":")
    read = generation_example if FORMATS[task].generates else classification_example
    examples = [read(row, FORMATS[task]) for row in open_source(f"{kind}:{SHARED / path}").rows()]
    assert len(examples) == count
    if task == "e2e":
        assert len({prompt for prompt, _ in examples}) == 630
    else:
        assert {label for _, label in examples} == {0, 1}
