"""What a file says twice, and what it holds beside what is read: nothing is passed over."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from locations import LANGUAGE_GOLDENS
from safetensors.numpy import load_file, save_file

from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.pretrained import PretrainedError, load_pretrained, read_config

LLAMA3 = json.loads((LANGUAGE_GOLDENS / "llama" / "config.json").read_text())["rope_parameters"]


@pytest.fixture
def altered(tmp_path):
    """``(name, settings, tensors) -> directory``: a golden with other settings and tensors."""

    def make(name, settings=(), tensors=()):
        place = tmp_path / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(LANGUAGE_GOLDENS / name, place)
        values = json.loads((place / "config.json").read_text()) | dict(settings)
        (place / "config.json").write_text(json.dumps(values))
        if tensors:
            file = place / "model.safetensors"
            found = load_file(file) | dict(tensors)
            save_file({key: value for key, value in found.items() if value is not None}, file)
        return place

    return make


def load(place, **overrides):
    return load_pretrained(place, jax.random.key(0), **overrides)


def refusal(function, *arguments, **named):
    with pytest.raises(PretrainedError) as error:
        function(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "older", "newer", "value"),
    [
        ("gpt2", "hidden_size", "n_embd", 20),
        ("gpt2", "num_attention_heads", "n_head", 2),
        ("gpt2", "num_hidden_layers", "n_layer", 1),
        ("gpt2", "max_position_embeddings", "n_positions", 64),
        ("t5", "hidden_size", "d_model", 20),
        ("t5", "num_attention_heads", "num_heads", 2),
        ("t5", "num_hidden_layers", "num_layers", 1),
        ("t5", "head_dim", "d_kv", 8),
    ],
)
def test_two_names_of_a_setting_agree_or_are_refused(altered, name, older, newer, value):
    error = refusal(read_config, altered(name, {older: value}))
    assert f"{older} = {value} and {newer} = " in error
    expected = read_config(LANGUAGE_GOLDENS / name)
    theirs = json.loads((LANGUAGE_GOLDENS / name / "config.json").read_text())[newer]
    for settings in ({older: theirs}, {older: theirs, newer: None}):
        assert read_config(altered(name, settings)) == expected


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("gpt2", {"n_ctx": 77}, "n_ctx = 77"),
        ("bert", {"num_labels": 5}, "num_labels = 5"),
        ("t5", {"dense_act_fn": "gelu"}, "dense_act_fn = 'gelu'"),
        ("t5_v1_1", {"is_gated_act": False}, "is_gated_act = False"),
        ("llama", {"rope_theta": 5e5}, "rope_theta = 500000.0"),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"type": "linear"}},
            "type = 'linear' and rope_type",
        ),
        ("llama", {"original_max_position_embeddings": 8}, "original_max_position_embeddings = 8"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        # The older section wins, and with it its base, which the newer one contradicts.
        (
            "llama",
            {
                "rope_parameters": LLAMA3 | {"rope_theta": 5e5},
                "rope_scaling": {"rope_type": "default"},
            },
            "rope_parameters: rope_theta = 500000.0",
        ),
    ],
)
def test_settings_that_contradict_others_are_refused(altered, name, settings, says):
    assert says in refusal(read_config, altered(name, settings))


def test_of_two_rotary_sections_the_older_wins_as_in_transformers(altered):
    older = LLAMA3 | {"factor": 2.0}
    both = read_config(altered("llama", {"rope_scaling": older}))
    assert both == read_config(altered("llama", {"rope_parameters": older}))
    assert both.rope_scaling.factor == 2.0


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_quantized_checkpoints_are_refused(altered, name):
    place = altered(name, {"quantization_config": {"quant_method": "fp8"}})
    assert "quantization_config is set: quantized weights are not read" in refusal(load, place)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_weights_of_eight_bits_are_refused(altered, dtype):
    name = "transformer.h.0.mlp.c_fc.weight"
    weights = load_file(LANGUAGE_GOLDENS / "gpt2" / "model.safetensors")[name].astype(dtype)
    error = refusal(load, altered("gpt2", tensors={name: weights}))
    assert f"tensor {name} is F8_E" in error
    assert "quantized weights are not read" in error


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_told(altered, value):
    name = "transformer.h.1.mlp.c_fc.bias"
    weights = load_file(LANGUAGE_GOLDENS / "gpt2" / "model.safetensors")[name].copy()
    weights[3] = value
    assert f"tensor {name} has values that are NaN or infinite" in refusal(
        load, altered("gpt2", tensors={name: weights})
    )
    # One that fits float64 only, too.
    weights = weights.astype(np.float64)
    weights[3] = 1e300
    assert "NaN or infinite in float32" in refusal(load, altered("gpt2", tensors={name: weights}))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_an_embedding_that_is_assumed_to_repeat_another_does(altered, side):
    table = load_file(LANGUAGE_GOLDENS / "t5" / "model.safetensors")["shared.weight"]
    name = f"{side}.embed_tokens.weight"
    jax.tree.map(
        np.testing.assert_array_equal,
        load(altered("t5", tensors={name: table.copy()})).params,
        load(LANGUAGE_GOLDENS / "t5").params,
    )
    error = refusal(load, altered("t5", tensors={name: table + 1}))
    assert f"tensor {name} is not shared.weight" in error


@pytest.mark.parametrize(
    ("name", "tensor", "right", "wrong"),
    [
        ("roberta", "roberta.embeddings.position_ids", np.arange(32), np.arange(32)[::-1].copy()),
        ("gpt2", "transformer.h.0.attn.bias", np.tri(32), np.ones((32, 32), np.uint8)),
        ("gpt2", "transformer.h.0.attn.masked_bias", np.float32(-1e4), np.float32(0)),
        (
            "llama_tied",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            np.float32([1, 0.0464159, 0.00215443]),
            np.float32([1, 0.0464159, 0.02]),
        ),
    ],
)
def test_buffers_hold_what_is_computed_here(altered, name, tensor, right, wrong):
    assert load(altered(name, tensors={tensor: np.asarray(right)})).fresh == ()
    error = refusal(load, altered(name, tensors={tensor: np.asarray(wrong)}))
    assert f"tensor {tensor} is not " in error


def test_a_t5_without_a_start_token_is_refused(altered):
    for value in (None, "0"):
        settings = {"decoder_start_token_id": value}
        assert "decoder_start_token_id" in refusal(read_config, altered("t5", settings))
    assert read_config(altered("t5", {"decoder_start_token_id": 3})).start_token_id == 3


@pytest.mark.parametrize("task", ["TokenClassification", "MultipleChoice"])
def test_a_head_for_tokens_is_not_taken_for_one_of_texts(altered, task):
    settings = {"architectures": [f"BertFor{task}"]}
    loaded = load(altered("bert", settings))
    theirs = load_file(LANGUAGE_GOLDENS / "bert" / "model.safetensors")["classifier.weight"]
    assert loaded.fresh == ("classifier/out/kernel", "classifier/out/bias")
    assert np.abs(loaded.params["classifier"]["out"]["kernel"] - theirs.T).max() > 0.1
    # RoBERTa's head of texts has other names than its head of tokens.
    settings = {"architectures": [f"RobertaFor{task}"]}
    tensors = {"classifier.weight": np.ones((3, 16), np.float32)}
    tensors |= {
        f"classifier.{layer}.{kind}": None
        for layer in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }
    loaded = load(altered("roberta", settings, tensors))
    assert len(loaded.fresh) == 4
    logits = make_language_model(loaded.config).apply_fn(
        loaded.params, {"tokens": np.full((1, 3), 5, np.int32)}, None
    )
    assert np.isfinite(logits).all()


def test_a_head_behind_a_layer_that_is_missing_is_drawn_whole(altered):
    tensors = {"bert.pooler.dense.weight": None, "bert.pooler.dense.bias": None}
    loaded = load(altered("bert", {"architectures": None}, tensors))
    assert len(loaded.fresh) == 4


def test_a_head_of_other_classes_says_how_many(altered):
    error = refusal(load, LANGUAGE_GOLDENS / "bert", classes=2)
    assert "classifier.weight is a head of 3 classes, but the task has 2: take data with 3" in error
    assert "config.json" not in error
