"""Text data sets: the division, the cache, and what a user is told."""

import io
import json

import numpy as np
import pytest
from locations import SHARED_DATA
from rich.console import Console
from text_cases import MARKS, WORDS, ids, tiny_tokenizer, write_tokenizer

from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.data.splits import fingerprint
from fedqsn_jax.data.text import array_cache, loading
from fedqsn_jax.data.text.loading import TextSettings
from fedqsn_jax.data.text.packing import pack
from fedqsn_jax.data.text.sources import open_source
from fedqsn_jax.data.text.tokenization import load_tokenizer

SHARED = SHARED_DATA
START, END = 1, 2
VOCABULARY = len(MARKS) + len(WORDS)


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_sst2(tmp_path, count=20, **columns):
    lines = [
        {"sentence": f"{('bad', 'good')[n % 2]} film", "label": n % 2}
        | {name: value(n) for name, value in columns.items()}
        for n in range(count)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"jsonl:{file}"


def load(tmp_path, source, tokenizer=None, *, seed=0, data=None, **settings):
    own = ("console", "encoder_decoder")
    options = {name: settings.pop(name) for name in own if name in settings}
    settings = {"task": "sst2", "cache": str(tmp_path / "cache")} | settings
    config = {"clients": 3, "partition": "iid", "private_rows": 4, "test_rows": 5} | (data or {})
    return loading.load(
        TextSettings(train=source, **settings),
        DataConfig(**config),
        tokenizer or tiny_tokenizer(tmp_path),
        np.random.default_rng(seed),
        **options,
    )


@pytest.mark.parametrize("first", [2**63 + 1, 2**127])
def test_large_ids_are_as_many_clients_as_they_are(tmp_path, first):
    """NumPy makes of such integers floats, which cannot tell them apart, or objects."""
    source = write_sst2(tmp_path, client_id=lambda n: (first, first + 1, first + 2, 5)[n % 4])
    natural = {"partition": "natural", "private_rows": 0}
    for _ in range(2):  # Tokenized, and from the cache.
        assert (
            load(tmp_path, source, test=source, length=5, data=natural).splits.clients.clients == 4
        )


def test_rows_of_which_nothing_is_left_to_be_predicted_are_left_out_and_told(tmp_path):
    """Each would count as a row of loss zero."""
    long, short = "good " * 20, "good"
    lines = [{"q": (long, short)[n % 2], "a": f"film {n}"} for n in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source, tokenizer = f"jsonl:{file}", tiny_tokenizer(tmp_path, "none", max_length=128)
    own = {"task": "own", "columns": ("q",), "target": "a", "test": source}

    data = load(tmp_path, source, tokenizer, length=9, **own)

    splits = data.splits
    parts = (splits.private, splits.test, splits.clients.examples)
    assert [len(each["tokens"]) for each in parts] == [4, 12, 8]
    for each in parts:
        assert np.asarray(each["loss_mask"])[:, 1:].any(axis=1).all()
    assert "24 of 48 rows are left out" in data.notes[0]
    # Those that are left have lost nothing.
    assert not any("lost tokens" in note for note in data.notes)
    message = refusal(load, tmp_path, source, tokenizer, length=2, **own)
    assert message.startswith("data.length = 2: the prompts fill it in every row")


def test_cuts_of_either_half_are_told_with_both_lengths(tmp_path):
    """Of 24 rows every third has a completion of six tokens and its end, others of one."""
    lines = [{"q": "good", "a": "film " * (1 if n % 3 else 6)} for n in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load(
        *(tmp_path, f"jsonl:{file}", tiny_tokenizer(tmp_path, "none", max_length=128)),
        **{"task": "own", "columns": ("q",), "target": "a", "test": f"jsonl:{file}"},
        **{"length": 9, "target_length": 4, "encoder_decoder": True},
    )
    assert data.notes == (
        "16 of the 48 rows that are used lost tokens beyond data.length = 9 (prompts) or "
        "data.target_length = 4 (completions)",
    )


def test_a_file_is_divided(tmp_path):
    data = load(tmp_path, write_sst2(tmp_path), length=5)
    splits = data.splits
    assert splits.test["tokens"].shape == (5, 5)
    assert splits.private["tokens"].shape == (4, 5)
    assert splits.clients.offsets.tolist() == [0, 4, 8, 11]
    assert (splits.num_classes, data.notes, data.prompts) == (2, (), None)
    for batch in (splits.test, splits.private, splits.clients.examples):
        good = np.asarray(batch["tokens"])[:, 1] == ids("good")[0]
        assert np.array_equal(good, np.asarray(batch["label"]) == 1)


def test_other_rows_have_another_fingerprint(tmp_path):
    def found(file="rows.tsv", rows=range(20), changed="good"):
        lines = [f"the film is {[changed, 'bad'][row % 2]}\t{1 - row % 2}" for row in rows]
        (tmp_path / file).write_text("\n".join(["sentence\tlabel", *lines, ""]))
        source = f"tsv:{tmp_path / file}"
        return fingerprint(load(tmp_path, source, test=source, length=6).splits)

    same = found()
    assert found("elsewhere.tsv") == same
    assert found(rows=range(18)) != same
    assert found(changed="food") != same


def test_natural_clients(tmp_path):
    source = write_sst2(tmp_path, client_id=lambda n: f"hospital {n % 4}")
    natural = {"partition": "natural", "private_rows": 0}
    data = load(tmp_path, source, test=source, length=5, data=natural)
    splits = data.splits
    assert (splits.clients.offsets.tolist(), data.notes) == ([0, 5, 10, 15, 20], ())
    assert set(splits.clients.examples) == set(splits.test) == {"tokens", "mask", "label"}
    # Row n has label n % 2, so every hospital has one label.
    assert (
        np.asarray(splits.clients.examples["label"]).reshape(4, 5).std(axis=1).tolist() == [0] * 4
    )
    dealt = load(tmp_path, source, test=source, length=5, data={"partition": "iid"})
    (note,) = dealt.notes
    assert note.startswith(f"the column client_id of {source} is not used: data.partition = 'iid'")
    (tmp_path / "other").mkdir()
    other = write_sst2(tmp_path / "other")
    assert "does not say whose its rows are" in refusal(load, tmp_path, other, data=natural)


def test_rows_of_clients_are_held_out(tmp_path):
    source = write_sst2(tmp_path, client_id=lambda n: f"hospital {n % 4}")
    held = {"partition": "natural", "private_rows": 0, "held_out_share": 0.4, "held_out_clients": 1}
    splits = load(tmp_path, source, test=source, length=5, data=held).splits
    assert splits.clients.offsets.tolist() == [0, 3, 6, 9]
    own, new = splits.client_tests["own"], splits.client_tests["new"]
    assert (own.offsets.tolist(), new.offsets.tolist()) == ([0, 2, 4, 6], [0, 5])
    for part in (splits.clients, own, new):
        assert set(part.examples) == set(splits.test) == {"tokens", "mask", "label"}
    # Each hospital has one label, so a client's rows have that of its others.
    for client in range(3):
        of_client = [
            np.asarray(part.examples["label"])[part.offsets[client] : part.offsets[client + 1]]
            for part in (splits.clients, own)
        ]
        assert len(set(np.concatenate(of_client).tolist())) == 1


def write_e2e(tmp_path):
    file = tmp_path / "rows.txt"
    names = ("Blue", "Spice", "pub", "food", "area")
    file.write_text(
        "".join(f"name : {n}||{n} is {x} .\n" for n in names for x in ("good", "bad", "cheap"))
    )
    return f"e2e:{file}"


def test_generation_is_divided(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, "none", max_length=128)
    data = load(tmp_path, write_e2e(tmp_path), tokenizer, task="e2e", length=16)
    assert data.splits.num_classes == 0
    # Five rows are asked for; the second prompt's three rows stay together.
    assert data.splits.test["loss_mask"].shape == (6, 16)
    held_out = np.asarray(data.splits.test["tokens"])
    assert list(map(len, data.prompts.references)) == [3, 3]
    trained = np.concatenate(
        [data.splits.private["tokens"], data.splits.clients.examples["tokens"]]
    )
    assert len(trained) == 9
    names = [{int(row[2]) for row in rows} for rows in (held_out, trained)]
    assert (len(names[0]), len(names[1]), names[0] & names[1]) == (2, 3, set())
    # Every held-out row, decoded, is one of the prompts followed by one of its references.
    expected = {
        tuple(ids(f"{prompt} {reference}".replace(":", " :").replace("\n", " ")))
        for prompt, some in zip(data.prompts.texts, data.prompts.references, strict=True)
        for reference in some
    }
    assert {tuple(t for t in row if t not in (0, END)) for row in held_out.tolist()} == expected
    skewed = {"partition": "dirichlet"}
    message = refusal(load, tmp_path, write_e2e(tmp_path), tokenizer, task="e2e", data=skewed)
    assert "no labels to skew; allowed are iid, natural" in message


@pytest.fixture
def tokenized(monkeypatch):
    """How often rows were tokenized."""
    calls = []

    def counting(*args):
        calls.append(args)
        return pack(*args)

    monkeypatch.setattr(loading, "pack", counting)
    return calls


def test_the_cache_saves_the_work(tmp_path, tokenized):
    source = write_sst2(tmp_path, client_id=str)
    first = load(tmp_path, source, length=3)
    second = load(tmp_path, source, length=3)
    assert len(tokenized) == 1
    assert first.notes == second.notes
    assert first.notes[0] == "20 of the 20 rows that are used lost tokens beyond data.length = 3"
    for name, array in first.splits.clients.examples.items():
        assert np.array_equal(array, second.splits.clients.examples[name])
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_one_files_bytes_are_other_rows_as_another_kind(tmp_path):
    file = tmp_path / "rows"
    file.write_text('{"a": 1}\n')
    assert open_source(f"tsv:{file}").digest() != open_source(f"jsonl:{file}").digest()


@pytest.mark.parametrize(
    "change", ["file", "columns", "labels", "length", "tokenizer", "truncate", "end"]
)
def test_the_cache_follows_what_it_depends_on(tmp_path, tokenized, change):
    source = write_sst2(tmp_path, count=20, text=lambda n: "pub")
    load(tmp_path, source, length=5)
    settings, tokenizer = {"length": 5}, tiny_tokenizer(tmp_path)
    match change:
        case "file":
            write_sst2(tmp_path, count=21, text=lambda n: "pub")
        case "columns":
            settings["columns"] = ("text",)
        case "labels":
            settings["labels"] = ("0", "1")
        case "length":
            settings["length"] = 6
        case "truncate":
            settings["truncate"] = False
        case "tokenizer":
            (tmp_path / "other").mkdir()
            tokenizer = tiny_tokenizer(tmp_path / "other", "none")
        case "end":
            tokenizer = load_tokenizer(tmp_path, VOCABULARY, 64, 0, (3,))
    load(tmp_path, source, tokenizer, **settings)
    assert len(tokenized) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_a_damaged_cache_is_built_anew(tmp_path, tokenized, damage):
    source = write_sst2(tmp_path)
    before = load(tmp_path, source, length=5).splits.test
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    position = content.index(np.asarray(before["tokens"])[0].tobytes())
    damaged = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "flipped": content[:position] + b"\x7f" + content[position + 1 :],
        "text": b"not a zip file",
    }[damage]
    assert damaged != content
    file.write_bytes(damaged)
    after = load(tmp_path, source, length=5).splits.test
    assert len(tokenized) == 2
    assert all(np.array_equal(before[name], after[name]) for name in before)
    load(tmp_path, source, length=5)
    assert len(tokenized) == 2


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(stream, **_):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    message = refusal(array_cache.cached, tmp_path, "key", lambda: {"a": np.zeros(3)})
    assert message == f"data.cache = '{tmp_path}': No space left on device"
    assert not list(tmp_path.iterdir())


def test_the_users_cache_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    load(tmp_path, write_sst2(tmp_path), length=5, cache="")
    assert list((tmp_path / "home" / "fedqsn_jax").iterdir())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_in_a_terminal_only(tmp_path, terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    load(tmp_path, write_sst2(tmp_path), length=5, console=console)
    assert ("tokenizing jsonl:" in stream.getvalue()) == terminal
    assert bool(stream.getvalue()) == terminal


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "squad"}, "data.task = 'squad': allowed are sst2,"),
        ({"length": 65}, "data.length = 65: allowed are 3 to 64, the positions of the model"),
        ({"length": 2}, "data.length = 2: allowed are 3 to 64"),
        ({"columns": ("a", "b")}, "data.columns = ('a', 'b'): sst2 has 1 inputs"),
        ({"labels": ("x", "y", "z")}, "data.labels"),
        ({"template": "{a}"}, "data.template = '{a}': sst2 has its own"),
        ({"task": "own", "columns": ("sentence",)}, "data.columns, data.target, data.length"),
        ({"data": {"test_rows": 20}}, "data.test_rows = 20: allowed is less than the 20 rows"),
        ({"columns": ("text",)}, "ROWS:1: no column 'text'; the row has 'sentence', 'label'"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, says):
    message = refusal(load, tmp_path, write_sst2(tmp_path), **settings)
    assert message.startswith(says.replace("ROWS", str(tmp_path / "rows.jsonl")))


def test_generation_needs_an_end(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, VOCABULARY, 64, 0)
    message = refusal(load, tmp_path, write_e2e(tmp_path), tokenizer, task="e2e", length=9)
    assert "eos_token_id" in message


def test_own_columns_and_labels(tmp_path):
    source = write_sst2(tmp_path, stars=lambda n: "xyz"[n % 3])
    own = {"columns": ("sentence",), "target": "stars", "labels": tuple("zyx"), "length": 5}
    splits = load(tmp_path, source, task="own", test=source, **own).splits
    assert splits.num_classes == 3
    assert splits.test["label"].tolist() == [(2, 1, 0)[n % 3] for n in range(20)]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")
def test_real_files_become_arrays(tmp_path):
    source = f"tsv:{SHARED}/mrpc/dev.tsv"
    tokenizer = tiny_tokenizer(tmp_path, max_length=128)
    data = load(tmp_path, source, tokenizer, task="mrpc", test=source)
    assert data.splits.test["tokens"].shape == (408, 80)
    assert int(data.splits.test["label"].sum()) == 279
