"""What columns mean: the tasks' formats, a user's own, labels and bad values."""

from pathlib import Path

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
