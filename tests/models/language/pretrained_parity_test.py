"""Models of the transformers library compute here what they compute there.

The goldens were made by make_parity_goldens.py beside this file, which says what they are.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_cases import jit
from locations import LANGUAGE_GOLDENS
from safetensors.numpy import load_file

from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.pretrained import load_pretrained, save_pretrained

GOLDENS = LANGUAGE_GOLDENS
NAMES = sorted(place.name for place in GOLDENS.iterdir())
CAUSAL = ("gemma", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")
TOLERANCE = 1e-4


@functools.cache
def golden(name):
    return dict(np.load(GOLDENS / name / "golden.npz"))


@functools.cache
def load(name):
    return load_pretrained(GOLDENS / name, jax.random.key(0))


def batch_of(found, mask="mask"):
    batch = {"tokens": found["tokens"], "mask": found[mask]}
    renamed = {"types": "token_types", "target": "target_tokens"}
    return batch | {ours: found[theirs] for theirs, ours in renamed.items() if theirs in found}


def stored_tensors(place):
    return {
        key: value for file in place.glob("*.safetensors") for key, value in load_file(file).items()
    }


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bert_base"])
def test_logits_equal_those_of_transformers(name):
    found = golden(name)
    loaded = load(name)
    assert loaded.fresh == ()
    apply_fn = jit(functools.partial(make_language_model(loaded.config).apply_fn, key=None))
    for mask in ("mask", "mask_left"):
        logits = f"logits{mask.removeprefix('mask')}"
        if logits in found:
            actual = apply_fn(loaded.params, batch_of(found, mask))
            # What stands at padding is nobody's business.
            causal = name.startswith(CAUSAL)
            real = found[mask].astype(bool) if causal else ...
            np.testing.assert_allclose(actual[real], found[logits][real], atol=TOLERANCE)
            assert np.abs(found[logits][real]).max() > 0.5


@pytest.mark.parametrize("name", ["bert", "bert_base", "distilbert", "roberta", "xlm_roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooled_states_equal_those_of_transformers(name, pooling):
    found = golden(name)
    loaded = load_pretrained(GOLDENS / name, jax.random.key(0), classes=0, pooling=pooling)
    pooled = jit(functools.partial(make_language_model(loaded.config).apply_fn, key=None))
    hidden, mask = found["hidden"], found["mask"][..., None]
    expected = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(pooled(loaded.params, batch_of(found)), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "gpt2", "llama", "mistral", "phi3", "qwen3", "t5"]
)
def test_greedy_tokens_equal_those_of_transformers(name):
    found = golden(name)
    loaded = load(name)
    decoder = make_language_model(loaded.config).decoder
    count = found["generated"].shape[1]

    @jit
    def generate(params, batch):
        def step(carry, _):
            logits, cache = carry
            tokens = logits.argmax(-1).astype(jnp.int32)
            return decoder.step(params, tokens, cache), tokens

        prefilled = decoder.prefill(params, batch, count)
        return jax.lax.scan(step, prefilled, length=count)[1].T

    batch = batch_of(found, "mask" if name.startswith("t5") else "mask_left")
    np.testing.assert_array_equal(generate(loaded.params, batch), found["generated"])


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_every_tensor_is_the_same(name, tmp_path):
    place = GOLDENS / name
    loaded = load_pretrained(place, jax.random.key(0))
    save_pretrained(tmp_path / "saved", loaded.config, loaded.params)
    before, after = stored_tensors(place), stored_tensors(tmp_path / "saved")
    if name == "bert_base":
        # It gains a head, and with it the longer names.
        assert {*after} - {f"bert.{key}" for key in before} == {
            "classifier.weight",
            "classifier.bias",
        }
        after = {key: after[f"bert.{key}"] for key in before}
    assert {*before} == {*after}
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    again = load_pretrained(tmp_path / "saved", jax.random.key(1))
    assert (again.config, again.fresh) == (loaded.config, ())
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize("name", NAMES)
def test_saved_settings_are_those_that_were_read(name, tmp_path):
    loaded = load(name)
    save_pretrained(tmp_path, loaded.config, loaded.params)
    theirs = json.loads((GOLDENS / name / "config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    differing = {key for key in ours if theirs.get(key) not in (None, ours[key])}
    # One gains a head, and the other has an output layer of its own, whatever that file says.
    allowed = {"bert_base": {"architectures"}, "t5_v1_1": {"tie_word_embeddings"}}
    assert differing == allowed.get(name, set())


def test_transformers_computes_the_same_of_what_is_saved(tmp_path):
    """Live, where that library is installed."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for name in NAMES:
        found = golden(name)
        loaded = load(name)
        save_pretrained(tmp_path / name, loaded.config, loaded.params)
        kind = json.loads((tmp_path / name / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, kind).from_pretrained(tmp_path / name).eval()
        inputs = {"input_ids": found["tokens"], "attention_mask": found["mask"]}
        renamed = {"types": "token_type_ids", "target": "labels"}
        inputs |= {theirs: found[ours] for ours, theirs in renamed.items() if ours in found}
        with torch.no_grad():
            logits = model(
                **{key: torch.tensor(value).long() for key, value in inputs.items()}
            ).logits
        if "logits" in found:
            np.testing.assert_allclose(logits.numpy(), found["logits"], atol=TOLERANCE)
        ours = make_language_model(loaded.config).apply_fn(loaded.params, batch_of(found), None)
        causal = name.startswith(CAUSAL)
        real = found["mask"].astype(bool) if causal else ...
        np.testing.assert_allclose(ours[real], logits.numpy()[real], atol=TOLERANCE)
