"""The command that writes a run's hidden model for the transformers library."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from locations import LANGUAGE_GOLDENS
from run_cases import make_run
from safetensors.numpy import load_file, save_file

from fedqsn_jax.cli.export import export, main
from fedqsn_jax.config.schema import ModelConfig
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.models.functional import linen_apply, linen_init
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.pretrained import description_files, load_pretrained
from fedqsn_jax.models.parameter_files import load_params, save_params
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.runs.working_directory import WorkDirectory

GOLDENS = LANGUAGE_GOLDENS


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("bert_base", {"classes": 4}),
        ("bert_base", {"classes": 4, "pooling": "mean"}),
        ("gpt2", {}),
        ("t5_v1_1", {}),
    ],
)
def test_the_latest_model_is_written(name, overrides, tmp_path, capsys):
    before = make_run(tmp_path / "run", name, **overrides)
    out = tmp_path / "model"
    assert main([f"--workdir={tmp_path / 'run'}", f"--out={out}"]) == 0
    assert "model: the hidden model after round 5; only you may" in capsys.readouterr().out
    after = load_pretrained(out, jax.random.key(1))
    assert (after.config, after.fresh) == (before.config, ())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 5), after.params, before.params)
    assert out.stat().st_mode & 0o777 == 0o700


def test_what_transformers_does_not_load_is_said(tmp_path, capsys):
    for pooling in ("cls", "mean"):
        make_run(tmp_path / f"run-{pooling}", "bert_base", classes=4, pooling=pooling)
        out = tmp_path / f"model-{pooling}"
        assert main([f"--workdir={tmp_path / f'run-{pooling}'}", f"--out={out}"]) == 0
        output = " ".join(capsys.readouterr().out.split())
        assert ("does not load" in output) == (pooling == "mean")
    line = "transformers' BertModel does not load classifier.weight, classifier.bias, which"
    assert line in output
    assert "fedqsn_jax loads the directory whole" in output
    written = load_file(out / "model.safetensors")
    outside = {name for name in written if not name.startswith("bert.")}
    assert outside == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", ["bert_base", "roberta"])
def test_a_model_of_pooled_means_is_loaded_whole(name, tmp_path):
    choices = {"classes": 2, "pooling": "mean"}
    before = make_run(tmp_path / "run", name, rounds=(1,), **choices)
    exported = export(tmp_path / "run", tmp_path / "model")
    assert exported.architecture == {"bert_base": "BertModel", "roberta": "RobertaModel"}[name]
    after = load_pretrained(tmp_path / "model", jax.random.key(9))
    batch = {
        "tokens": jnp.asarray([[3, 5, 7, 9], [4, 6, 1, 1]], jnp.int32),
        "mask": jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], jnp.int32),
    }
    trained = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 1, before.params)
    expected = make_language_model(before.config).apply_fn(trained, batch, None)
    logits = make_language_model(after.config).apply_fn(after.params, batch, None)
    assert logits.shape == (2, 2)
    np.testing.assert_array_equal(logits, expected)


def test_a_run_keeps_what_its_export_needs(tmp_path, monkeypatch):
    run, source = tmp_path / "run", tmp_path / "tiny"
    before = make_run(run, "gpt2", rounds=(1,))
    source.mkdir()
    (source / "config.json").write_text((GOLDENS / "gpt2" / "config.json").read_text())
    (source / "merges.txt").write_text("merges")
    (run / "config.json").write_text(json.dumps({"model": {"pretrained": "tiny"}}))
    WorkDirectory(run).keep_files(description_files(source))
    assert {file.name for file in (run / "model").iterdir()} == {"config.json", "merges.txt"}
    assert (run / "model").stat().st_mode & 0o777 == 0o700
    # The model's directory is gone, and a directory of its name here is another's.
    shutil.rmtree(source)
    (tmp_path / "elsewhere" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert export(run, tmp_path / "out").round == 1
    assert load_pretrained(tmp_path / "out", jax.random.key(0)).config == before.config
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges"


def test_an_older_run_says_where_its_model_is_sought(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    make_run(run, "gpt2", rounds=(1,))
    (run / "config.json").write_text(json.dumps({"model": {"pretrained": "some/where/tiny"}}))
    monkeypatch.chdir(tmp_path)
    assert main([f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the run has no copy of its model's config.json, and model some/where/tiny: no such" in (
        error
    )
    assert "a relative directory is sought from here, so export where the run was started" in error
    shutil.copytree(GOLDENS / "gpt2", tmp_path / "some" / "where" / "tiny")
    assert main([f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 0


def test_an_earlier_round_and_the_tokenizer(tmp_path, monkeypatch):
    before = make_run(tmp_path / "run", "gpt2")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt"):
        text = (GOLDENS / "gpt2" / name).read_text() if name == "config.json" else name
        (source / name).write_text(text)
    values = json.dumps({"model": {"pretrained": str(source)}})
    (tmp_path / "run" / "config.json").write_text(values)
    out = tmp_path / "model"
    out.mkdir()
    assert main([f"--workdir={tmp_path / 'run'}", f"--out={out}", "--round=3"]) == 0
    names = {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert {file.name for file in out.iterdir()} == names
    assert (out / "merges.txt").read_text() == "merges.txt"
    params = load_pretrained(out, jax.random.key(0)).params
    np.testing.assert_array_equal(
        params["final_norm"]["bias"], before.params["final_norm"]["bias"] + 3
    )


def test_mistakes_are_one_line(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "model"

    def refused(*arguments):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no --workdir: name a directory" in refused()
    assert "no --out: name a directory" in refused(f"--workdir={run}")
    both = f"--workdir={run}", f"--out={out}"
    assert "run: there is no run in it" in refused(*both)
    run.mkdir()
    (run / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(*both)
    (run / "config.json").write_text(json.dumps({"algorithm": "fedsp"}))
    assert "fedsp tunes prompts" in refused(*both)
    values = {"model": {"pretrained": str(GOLDENS / "gpt2")}}
    (run / "config.json").write_text(json.dumps(values))
    assert "there is no checkpoint" in refused(*both)
    assert "there is no checkpoint of round 2" in refused(*both, "--round=2")
    assert "--round=x: allowed are best, last or the number of a" in refused(*both, "--round=x")
    out.mkdir()
    (out / "something").write_text("")
    assert "it is not empty; name a new or empty directory" in refused(*both)


def save_rounds(directory, params, scores):
    """Checkpoints with a score a round, each tensor raised by the round."""
    with Checkpoints(directory / "checkpoints", keep_latest=9, keep_best=0) as checkpoints:
        history = []
        for number, score in scores.items():
            history.append({"round": number, "global/accuracy": score})
            raised = jax.tree.map(lambda leaf: leaf + number, params)  # noqa: B023
            checkpoints.save(number, {"params": raised}, history, score)


def test_an_image_model_of_the_best_round_computes_as_it_did(tmp_path, capsys):
    model = {"name": "mlp", "hidden": [5, 4], "channels": [3]}
    module = make_model(ModelConfig(hidden=(5, 4)), classes=3)
    images = {"image": jnp.linspace(0, 1, 12).reshape(2, 6)}
    params = linen_init(module, jax.random.key(0), images)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": model}))
    save_rounds(run, params, {1: 0.5, 2: 0.7, 3: 0.7, 4: float("nan"), 5: 0.6})
    for number, which in ((3, "best"), (5, "last"), (1, "1")):
        out = tmp_path / which
        assert main([f"--workdir={run}", f"--out={out}", f"--round={which}"]) == 0
        output = " ".join(capsys.readouterr().out.split())
        assert f"the hidden model after round {number}; only you may read it" in output
        assert "fedqsn_jax.models.parameter_files.load_params reads it" in output
        assert out.stat().st_mode & 0o777 == 0o700
        saved = load_params(out)
        assert saved.description == {
            "round": number,
            "model": {"name": "mlp", "hidden": [5, 4]},
            "classes": 3,
        }
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b + number),  # noqa: B023
            saved.params,
            params,
        )
        again = make_model(ModelConfig(hidden=tuple(saved.description["model"]["hidden"])), 3)
        raised = jax.tree.map(lambda leaf: leaf + number, params)  # noqa: B023
        np.testing.assert_array_equal(
            linen_apply(again)(saved.params, images, None),
            linen_apply(module)(raised, images, None),
        )


def test_a_model_of_a_users_own_is_written_with_its_tensors(tmp_path):
    params = {"encoder": {"w": jnp.ones((2, 3), jnp.bfloat16)}, "scale": jnp.float32(2)}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    save_rounds(run, params, {0: 0.1})
    assert export(run, tmp_path / "out") == (0, "", ())
    saved = load_params(tmp_path / "out")
    assert saved.description == {"round": 0, "model": {}}
    assert jax.tree.structure(saved.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, saved.params, params)
    assert saved.params["encoder"]["w"].dtype == jnp.bfloat16


def test_saved_parameters_that_were_changed_are_refused(tmp_path):
    save_params(tmp_path, {"w": np.ones(3, np.float32)}, {"made by": "me"})
    assert load_params(tmp_path).description == {"made by": "me"}
    save_file({"w": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"w is \['float32', \[4\]\], but model.json says"):
        load_params(tmp_path)
    (tmp_path / "model.json").write_text('{"format": "another"}')
    with pytest.raises(UserError, match="format = 'another': allowed is"):
        load_params(tmp_path)


@pytest.mark.parametrize(
    ("data", "classes", "names"),
    [
        ({"task": "sst2"}, 2, ["negative", "positive"]),
        (
            {"task": "own", "columns": ["t"], "target": "l", "length": 9, "labels": list("abc")},
            3,
            "abc",
        ),
        ({"task": "sst2"}, 4, [f"LABEL_{index}" for index in range(4)]),
        ({}, 2, ["LABEL_0", "LABEL_1"]),
    ],
)
def test_the_tasks_names_of_classes_are_written(data, classes, names, tmp_path):
    make_run(tmp_path / "run", "bert_base", rounds=(1,), classes=classes)
    values = {"model": {"pretrained": str(GOLDENS / "bert_base")}, "data": data}
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    export(tmp_path / "run", tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["id2label"] == {str(index): name for index, name in enumerate(names)}
    assert written["label2id"] == {name: index for index, name in enumerate(names)}
