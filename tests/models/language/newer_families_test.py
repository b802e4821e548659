"""Settings of Gemma, Phi-3 and DistilBERT that files write in several ways, or that are refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from locations import LANGUAGE_GOLDENS

from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.gemma import GemmaNorm
from fedqsn_jax.models.language.pretrained import PretrainedError, load_pretrained, read_config
from fedqsn_jax.models.language.rotary_positions import rotate
from fedqsn_jax.protocol.sites import find_sites


@pytest.fixture
def config_of(tmp_path):
    """``(name, **settings) -> configuration`` of a golden with other settings; None removes one."""

    def read(name, **settings):
        place = tmp_path / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        values = json.loads((LANGUAGE_GOLDENS / name / "config.json").read_text()) | settings
        values = {key: value for key, value in values.items() if value is not ...}
        (place / "config.json").write_text(json.dumps(values))
        return read_config(place)

    return read


def test_files_of_gemma_3_as_they_were_written_first(config_of):
    """The hub's files have both bases and a pattern; transformers writes sections by kind today."""
    older = {
        "rope_parameters": ...,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "layer_types": ...,
        "sliding_window_pattern": 2,
    }
    expected = read_config(LANGUAGE_GOLDENS / "gemma3")
    assert config_of("gemma3", **older) == expected
    assert expected.windowed == (True, False, True)
    # What the family has where a file says nothing.
    bare = config_of("gemma3", rope_parameters=..., layer_types=...)
    assert (bare.rope_base, bare.window_rope_base) == (1e6, 1e4)
    assert bare.windowed == (True, True, True), "the sixth would be the first without"
    assert config_of("gemma2", layer_types=...).windowed == (True, False, True)


def test_longer_sequences_than_the_first_training_are_refused(config_of):
    config = read_config(LANGUAGE_GOLDENS / "phi3")
    assert (config.positions, config.max_length, config.turned) == (32, 16, 4)
    # sqrt(1 + ln(32 / 16) / ln(16)).
    assert config.rope_scaling.attention_factor == pytest.approx(1.25**0.5)
    model = make_language_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="sequences of 17 tokens: the model has 16 positions"):
        jax.eval_shape(
            lambda params: model.apply_fn(params, {"tokens": jnp.zeros((1, 17), int)}, None), shapes
        )
    older = config_of("phi3", rope_scaling={
        "type": "su", "short_factor": [1, 1.7], "long_factor": [2, 9],
    }, rope_theta=100.0, partial_rotary_factor=0.5, rope_parameters=...)  # fmt: skip
    assert older == config


ROPE = json.loads((LANGUAGE_GOLDENS / "gemma3" / "config.json").read_text())["rope_parameters"]
SCALED = {**ROPE, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types: 1 for 3 layers"),
        ("gemma3", {"rope_parameters": SCALED}, "sliding_attention is scaled"),
        ("gemma2", {"hidden_act": "relu"}, "two names of one setting"),
        ("gemma2", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        (
            "phi3",
            {"rope_scaling": {"rope_type": "linear", "rope_theta": 100.0}},
            "rope_type = 'linear'",
        ),
        ("phi3", {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
        ("distilbert", {"hidden_size": 20}, "hidden_size = 20 and dim = 16"),
        ("distilbert", {"n_heads": 3}, "width 16 is no multiple of 3 heads"),
    ],
)
def test_what_is_not_computed_is_refused_in_a_line(config_of, name, settings, told):
    with pytest.raises(PretrainedError) as error:
        config_of(name, **settings)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_part_of_each_head_is_turned():
    """By complex numbers: entry i and i + 2 of the first four, the others stay."""
    heads = np.random.default_rng(0).normal(size=(1, 2, 1, 6)).astype(np.float32)
    angles = np.array([0.3, 2.0], np.float32).reshape(1, 1, 1, 2)
    turned = np.asarray(rotate(jnp.asarray(heads), (jnp.cos(angles), jnp.sin(angles))))
    expected = (heads[..., :2] + 1j * heads[..., 2:4]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :2], expected.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 2:4], expected.imag, atol=1e-6)
    np.testing.assert_array_equal(turned[..., 4:], heads[..., 4:])


def test_the_norm_of_gemma_by_hand():
    norm = GemmaNorm(0.0, "float32")
    found = norm.apply({"params": {"scale": jnp.array([0.0, 1.0])}}, jnp.array([[3.0, 4.0]]))
    # The root of the mean square is sqrt(12.5).
    np.testing.assert_allclose(found, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3", "distilbert"])
def test_their_kernels_are_mask_sites(name):
    loaded = load_pretrained(LANGUAGE_GOLDENS / name, jax.random.key(0))
    attention = {f"layers/attention/{part}/kernel" for part in ("query", "key", "value", "out")}
    mlp = ("up", "down") if name == "distilbert" else ("gate", "up", "down")
    expected = attention | {f"layers/mlp/{part}/kernel" for part in mlp}
    found = {site.path for site in find_sites(loaded.params)}
    assert {path for path in found if path.startswith("layers/")} == expected
