"""Whole runs of tiny language models on texts, by the command line."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from language_run_cases import BERT, GPT2, VOCABULARY, classify, write, write_model

from fedqsn_jax.cli.export import main as export
from fedqsn_jax.cli.main import main
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import ConfigError
from fedqsn_jax.data.text import tokenization
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.llama import LlamaConfig
from fedqsn_jax.models.language.pretrained import load_pretrained
from fedqsn_jax.models.language.pretrained import read_config as read_settings
from fedqsn_jax.models.language.rotary_positions import RopeScaling
from fedqsn_jax.models.language.t5 import T5Config
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.problems.problem import problem_settings
from fedqsn_jax.runs.experiment import load_problem
from fedqsn_jax.runs.trained import load

RESIDUAL = ["--config.sites=residual"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The directory of a tiny BERT with its tokenizer and two files of sentences."""
    return write_model(tmp_path_factory.mktemp("bert"), BERT)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("gpt2"), GPT2, seed=2)


@pytest.mark.usefixtures("quick_compilation")
def test_a_classifier_learns_and_is_exported(bert, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*classify(bert), f"--workdir={run}", "--config.quantize_embeddings=True"]) == 0
    output = capsys.readouterr().out
    assert "drawn at random" in output
    assert "the server trains on its own rows first, 60 steps" in output
    assert "distils" not in output
    # Wherever the model's directory is by then, the run can be exported.
    for name in ("config.json", "tokenizer.json"):
        assert (run / "model" / name).read_bytes() == (bert / name).read_bytes()
    assert "classifier/out/kernel" in output
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    # As the README reads it.
    model = make_language_model(read_settings(run / "model", classes=2, pooling="mean"))
    problem = load_problem(problem_settings(load(run).config))
    batch = {name: jnp.asarray(problem.splits.test[name]) for name in ("tokens", "mask")}
    logits = jax.jit(lambda params: model.apply_fn(params, batch, None))(load(run).params)
    share = np.mean(logits.argmax(-1) == problem.splits.test["label"])
    assert share == last["global/accuracy"]
    with pytest.raises(ConfigError, match="make_language_model"):
        make_model(load(run).config.model, classes=2)
    # One word decides; sixty steps of the server's on eight rows are enough to see it.
    assert last["global/accuracy"] == 1.0
    # The embeddings' 58 x 16 codes of 4 bits replace as many float32 numbers.
    whole = json.loads((run / "summary.json").read_text())["bytes"]["down"]["fedavg"]
    assert last["bytes/down_per_client"] < 0.35 * whole
    assert export([f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 0
    trained = load_pretrained(tmp_path / "out", jax.random.key(0), pooling="mean")
    assert trained.config.classes == 2
    assert not trained.fresh
    assert (tmp_path / "out" / "tokenizer.json").exists()
    # A finished run says so.
    assert main([*classify(bert), f"--workdir={run}", "--config.quantize_embeddings=True"]) == 0
    assert "finished at round 2" in capsys.readouterr().out


FEDSP = [
    "--config=configs/sst2_minilm.py:fedsp",
    "--config.data.length=8",
    "--config.fedsp.distillation_steps=4",
    "--config.pretraining.steps=0",
]


@pytest.mark.usefixtures("quick_compilation")
def test_prompts_are_tuned_for_a_model_that_stays_with_the_server(bert, tmp_path, capsys):
    run, options = tmp_path / "run", ["--config.fedsp.auxiliary_share=0.5"]
    assert main([*classify(bert), *FEDSP, *options, f"--workdir={run}"]) == 0
    output = " ".join("".join(capsys.readouterr()).split())
    assert "clients receive a small model that is made to be like the hidden one" in output
    assert "never sent" in output
    assert "the server distils on its own rows the small model that clients get, 4 steps" in output
    assert "the server trains" not in output
    first, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert (run / "accuracy.png").exists()
    assert last["proxy/loss"] == last["server/loss"] != first["proxy/loss"]
    assert last["global/loss"] not in (last["proxy/loss"], first["global/loss"])
    # Colluders have taken part, and have what clients had then.
    assert last["attacker_2/loss"] != first["attacker_2/loss"]
    start, end = (load(run, round).params for round in (0, 2))
    jax.tree.map(np.testing.assert_array_equal, start["model"], end["model"])
    assert read_settings(run / "model").layers == 2
    jax.tree.map(np.testing.assert_array_equal, start["auxiliary"], end["auxiliary"])
    # Some changes are less than the last place.
    assert (start["prompts"] != end["prompts"]).mean() > 0.9
    # Up go 8 keys and values of 16 entries, and a few bytes of a header.
    assert 0 <= last["bytes/up_per_client"] - 4 * 2 * 8 * 16 <= 64
    assert export([f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 2
    assert "prompts" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_compilation")
def test_a_decoder_writes_texts_for_every_view(gpt2, tmp_path, capsys):
    run = tmp_path / "run"
    # Few sites: most of the time is compilation of what is done to them.
    changes = ["data.held_out_share=0.3", "upload.bits=4", "lora.rank=2", "lora.quantize=True"]
    options = [*(f"--config.{change}" for change in changes), *RESIDUAL]
    assert main([*write(gpt2), *options, f"--workdir={run}"]) == 0
    output = capsys.readouterr().out
    assert "texts after the last round" in output
    heads = r"clients' own held-out rows, token_accuracy +mean at end +worst tenth +spread\n"
    assert re.search(heads, output)
    stored = json.loads((run / "texts.json").read_text())
    views = {"global", "server", "proxy", "attacker_2"}
    assert stored["round"] == 2
    assert {name.partition("/")[0] for name in stored["metrics"]} == views
    first = stored["texts"][0]
    assert set(first) == {"prompt", "references", *views}
    assert first["prompt"].startswith("name: ")
    assert len(first["references"]) >= 2
    summary = json.loads((run / "summary.json").read_text())
    assert summary["texts"] == stored["metrics"]
    assert summary["score"] == "token_accuracy"
    assert set(summary["clients"]["own"]) == views
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["own/global/perplexity"] > 1
    # Up go adapters alone.
    assert last["bytes/up_per_client"] < 0.1 * last["bytes/down_per_client"]
    # They are not written again as long as the round is the same.
    before = (run / "texts.json").stat().st_mtime_ns
    assert main([*write(gpt2), *options, f"--workdir={run}"]) == 0
    assert (run / "texts.json").stat().st_mtime_ns == before


ADAPTED = ("query/kernel", "down/kernel")
OTHERS = {
    "qwen2": LlamaConfig(
        "qwen2",
        VOCABULARY,
        *(16, 2, 4, 2, 4, 16),
        positions=32,
        rope_scaling=RopeScaling(8, 1, 4, 16),
        biases=True,
        tied=True,
        eos_token_ids=(2,),
    ),
    "t5": T5Config(
        "t5",
        VOCABULARY,
        *(16, 2, 2, 2, 8, 16),
        gated=True,
        tied=False,
        scaled_output=False,
        eos_token_ids=(2,),
    ),
}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("family", "rank"), [("qwen2", 2), ("t5", 0)])
def test_every_other_family_trains_and_is_exported_as_it_is_evaluated(family, rank, tmp_path):
    """The exported model computes what the run's does; its loss is the one that was reported.

    With adapters it is the merged one, and nothing but what they are added to has changed.
    """
    place, run, out = tmp_path / family, tmp_path / "run", tmp_path / "out"
    place.mkdir()
    write_model(place, OTHERS[family])
    fields = {"generation.prompts": 0, "pretraining.steps": 0, "rounds": 1, "lora.rank": rank}
    if rank:
        fields["lora.matrices"] = tuple(f"*/{name}" for name in ADAPTED)
    changes = [f"--config.{name}={value}" for name, value in fields.items()]
    assert main([*write(place), *changes, *RESIDUAL, f"--workdir={run}"]) == 0
    assert export([f"--workdir={run}", f"--out={out}"]) == 0
    trained, exported = load(run), load_pretrained(out, jax.random.key(0))
    assert (exported.config, exported.fresh) == (OTHERS[family], ())
    problem = load_problem(problem_settings(trained.config))
    batch = {name: jnp.asarray(rows) for name, rows in problem.splits.test.items()}
    apply = jax.jit(make_language_model(exported.config, dropout=0.0).apply_fn)
    logits = apply(exported.params, batch, None)
    np.testing.assert_array_equal(logits, apply(trained.params, batch, None))
    before = load_pretrained(place, jax.random.key(0)).params
    moved = jax.tree.map(lambda start, end: (start != end).any(), before, exported.params)
    for path, has_moved in traverse_util.flatten_dict(moved, sep="/").items():
        assert has_moved == (not rank or path.endswith(ADAPTED)), path
    last = trained.history[-1]
    sums = problem.task.statistics(logits, batch, jnp.ones(len(logits), bool))
    assert problem.task.summarize(sums)["loss"] == pytest.approx(last["global/loss"], rel=1e-4)
    views = {"global", "server", "proxy", "attacker_2"}
    assert all(np.isfinite(last[f"{view}/perplexity"]) for view in views)


MISTAKES = {
    "no model": (["--config.model.pretrained="], "model.pretrained = '': a language model"),
    "no task": (["--config.data.task="], "data.task = '': a language model on text needs it"),
    "unknown task": (["--config.data.task=sst3"], "data.task = 'sst3': allowed are sst2"),
    "images for it": (["--config.data.name=digits"], "'text' and 'language' go together"),
    "no such hub name": (
        ["--config.model.pretrained=nobody/nothing"],
        "model nobody/nothing: no such directory",
    ),
    "an encoder cannot write": (
        ["--config.data.task=e2e"],
        "is a bert, which cannot; allowed are gemma2, gemma3_text, gpt2",
    ),
    "classes are not written": (["--config.generation.prompts=3"], "generation.prompts = 3"),
    "classes are not smoothed": (
        ["--config.client.label_smoothing=0.1"],
        "client.label_smoothing = 0.1: data.task = 'sst2' is classification",
    ),
    "too many rows": (["--config.data.train_rows=41"], "data.train_rows = 41: allowed is at most"),
    "too long": (["--config.data.length=17"], "data.length = 17: allowed are 3 to 16"),
    "flag": (["--config.data.truncate=3"], "data.truncate"),
    "prompts with adapters": (
        [*FEDSP, "--config.lora.rank=2"],
        "lora.rank = 2 with algorithm = 'fedsp': allowed is 0",
    ),
    "prompts as codes": (
        [*FEDSP, "--config.upload.bits=4"],
        "upload.bits = 4 with algorithm = 'fedsp': allowed is 0",
    ),
    "nothing is tuned": (
        [*FEDSP, "--config.fedsp.tuned=()"],
        "fedsp.tuned = (): allowed are one or more of prompts, classifier",
    ),
    "nothing to distil on": (
        [*FEDSP, "--config.data.private_rows=0"],
        "fedsp.distillation_steps = 4 with data.private_rows = 0",
    ),
    "no such layer": (
        [*FEDSP, "--config.fedsp.layers=(2,)"],
        "fedsp.layers = (2,): allowed are one or more of -2 to 1",
    ),
    "more layers than there are": (
        [*FEDSP, "--config.fedsp.passes=3"],
        "fedsp.passes = 3 of 1 layers: allowed are no more layers in all than the model's 2",
    ),
    "cuDNN in float32": (["--config.model.attention=cudnn"], "allowed is bfloat16"),
}


def test_a_tokenizer_that_may_be_anothers_is_told(bert, monkeypatch, capsys):
    # As if the vocabulary were so large that a few per cent were many tokens.
    monkeypatch.setattr(tokenization, "_FEW", 0)
    monkeypatch.setattr(tokenization, "_USUAL_SHARE", 1.01)
    assert main([*classify(bert), "--dry_run"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "make sure that it belongs to this model" in output


def test_a_decoder_has_no_classes_and_no_prompts(gpt2, bert, capsys):
    assert main([*classify(bert), f"--config.model.pretrained={gpt2}", "--dry_run"]) == 2
    assert "is a gpt2, which has no classifier; allowed are bert" in capsys.readouterr().err
    assert main([*write(gpt2), "--config.algorithm=fedsp", "--dry_run"]) == 2
    assert "it is a gpt2; allowed are bert, distilbert, roberta" in capsys.readouterr().err


CONFIGS = {
    "glue.py:mrpc,elsewhere,fedavg": ("mrpc", "tfds:glue/mrpc", "elsewhere", "fedavg"),
    "nlg.py:dart,gpt2-xl": ("dart", "tfds:dart", "openai-community/gpt2-xl", "fedqsn"),
    "nlg.py:e2e,gpt2,released": ("e2e", "tfds:e2e_cleaned", "openai-community/gpt2", "fedqsn"),
    "e2e_smollm2.py:fedq": ("e2e", "e2e:e2e/valid.txt", "smollm2-135m", "fedq"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_take_task_model_and_algorithm(name):
    config = read_config(f"configs/{name}", [])
    found = config.data.task, config.data.train, config.model.pretrained, config.algorithm
    assert found == CONFIGS[name]


@pytest.mark.parametrize(
    ("name", "smoothing"), [("glue.py:rte,roberta-large", 0.0), ("nlg.py:dart,gpt2-large", 0.1)]
)
def test_the_papers_set_up(name, smoothing):
    config = read_config(f"configs/{name}", [])
    assert (config.data.clients, config.cohort.size, config.rounds) == (25, 5, 10)
    client = config.client
    assert (client.epochs, client.steps, client.label_smoothing) == (1, 0, smoothing)
    for training in (config.pretraining, client):
        assert (training.optimizer, training.schedule, training.warmup) == ("adamw", "linear", 0.06)
        assert training.clip_norm == 0


WORDS_THAT_DO_NOT_FIT = {
    "glue.py:sst3,roberta-base": ("'sst3', 'roberta-base': taken for the model", "rte, sst2, mrpc"),
    "glue.py:fedaveg,rte,roberta-base": ("'fedaveg', 'roberta-base': taken for the model", "fedsn"),
    "glue.py:rte,sst2": ("'rte', 'sst2': taken for the task", "qnli, mnli"),
    "glue.py:fedq,released,rte": ("'fedq', 'released': taken for the algorithm", "fedsp, released"),
    "glue.py:rte,": ("'': taken for the model", "roberta-large, another name on the hub"),
    "nlg.py:e2e,gpt2,mine": ("'gpt2', 'mine': taken for the model", "e2e, dart, viggo, dialogsum"),
    "nlg.py:dart,fedavg,fedq": ("'fedavg', 'fedq': taken for the algorithm", "gpt2-xl, llama-3.2"),
}


@pytest.mark.parametrize("name", WORDS_THAT_DO_NOT_FIT)
def test_words_that_say_the_same_thing_twice_are_refused(name, tmp_path, capsys):
    assert main([f"--config=configs/{name}", f"--workdir={tmp_path / 'run'}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"--config=configs/{name}: " in captured.err
    for expected in WORDS_THAT_DO_NOT_FIT[name]:
        assert expected in captured.err


def test_one_word_of_its_own_is_the_model():
    config = read_config("configs/glue.py:sst3", [])
    assert (config.data.task, config.model.pretrained) == ("sst2", "sst3")
    config = read_config("configs/nlg.py", [])
    assert (config.data.task, config.algorithm) == ("e2e", "fedqsn")
    assert config.model.pretrained == "openai-community/gpt2-medium"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, bert, tmp_path, capsys):
    arguments, expected = MISTAKES[mistake]
    assert main([*classify(bert), f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert not (tmp_path / "run").exists()
