"""Mask sites of every family of language models, listed by hand."""

import jax
import numpy as np
import pytest
from language_cases import CONFIGS, batch_of, jit, random_params
from wire_cases import assert_same

from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.protocol import wire
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import (
    chain,
    client_mask,
    effective_params,
    quantize,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.sites import embedding_rules, find_sites


def shapes_of(name):
    return jax.eval_shape(make_language_model(CONFIGS[name]).init, jax.random.key(0))


def facts(sites):
    """``path: (layers, fan-in, columns, whether it has a bias)``."""
    return {
        site.path.removesuffix("/kernel"): (
            site.layers,
            site.fan_in,
            site.columns,
            site.bias_path == site.path.removesuffix("kernel") + "bias",
        )
        for site in sites
    }


# Two layers of width 8 with 2 heads of 4, an MLP of 12.
ENCODER = {
    "layers/attention/query": (2, 8, 8, True),
    "layers/attention/key": (2, 8, 8, True),
    "layers/attention/value": (2, 8, 8, True),
    "layers/attention/out": (2, 8, 8, True),
    "layers/mlp/up": (2, 8, 12, True),
    "layers/mlp/down": (2, 12, 8, True),
}


def t5_side(side, layers, *attentions):
    """T5: 2 heads of 6, a gated MLP of 12, no biases."""
    found = {
        f"{side}/layers/mlp/up": (layers, 8, 12, False),
        f"{side}/layers/mlp/gate": (layers, 8, 12, False),
        f"{side}/layers/mlp/down": (layers, 12, 8, False),
    }
    for name in attentions:
        for part in ("query", "key", "value"):
            found[f"{side}/layers/{name}/{part}"] = (layers, 8, 12, False)
        found[f"{side}/layers/{name}/out"] = (layers, 12, 8, False)
    return found


ALL = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "gpt2": ENCODER,
    # 4 query heads of 6 entries, 2 key heads; a gated MLP of 12, no biases.
    "llama": {
        "layers/attention/query": (2, 8, 24, False),
        "layers/attention/key": (2, 8, 12, False),
        "layers/attention/value": (2, 8, 12, False),
        "layers/attention/out": (2, 24, 8, False),
        "layers/mlp/up": (2, 8, 12, False),
        "layers/mlp/gate": (2, 8, 12, False),
        "layers/mlp/down": (2, 12, 8, False),
    },
    # 4 query heads of 2 entries, 2 key heads; biases of query, key and value.
    "qwen2": {
        "layers/attention/query": (2, 8, 8, True),
        "layers/attention/key": (2, 8, 4, True),
        "layers/attention/value": (2, 8, 4, True),
        "layers/attention/out": (2, 8, 8, False),
        "layers/mlp/up": (2, 8, 12, False),
        "layers/mlp/gate": (2, 8, 12, False),
        "layers/mlp/down": (2, 12, 8, False),
    },
    "t5": t5_side("encoder", 2, "attention")
    | t5_side("decoder", 3, "self_attention", "cross_attention"),
}
RESIDUAL = {
    "t5": [
        "encoder/layers/attention/out",
        "encoder/layers/mlp/down",
        "decoder/layers/self_attention/out",
        "decoder/layers/cross_attention/out",
        "decoder/layers/mlp/down",
    ],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_sites(name):
    sites = find_sites(shapes_of(name))
    assert facts(sites) == ALL[name]
    assert all(site.hideable and site.layer_axes == (0,) for site in sites)


@pytest.mark.parametrize("name", CONFIGS)
def test_residual_sites(name):
    expected = RESIDUAL.get(name, ["layers/attention/out", "layers/mlp/down"])
    found = facts(find_sites(shapes_of(name), selection="residual"))
    assert found == {path: ALL[name][path] for path in expected}


EMBEDDINGS = {
    # A column is a token's row: its 8 features share their scales.
    "bert": {"token_embed": (20, 8), "position_embed": (16, 8), "type_embed": (2, 8)},
    "gpt2": {"token_embed": (20, 8), "position_embed": (16, 8)},
    "llama": {"token_embed": (20, 8), "lm_head": (20, 8)},
    "qwen2": {"token_embed": (20, 8)},
    "t5": {
        "token_embed": (20, 8),
        "encoder/relative_embed": (32, 2),
        "decoder/relative_embed": (32, 2),
        "lm_head": (20, 8),
    },
}


@pytest.mark.parametrize("selection", ["all", "residual"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_and_output_layers_can_be_quantized_and_are_never_hidden(name, selection):
    shapes = shapes_of(name)
    sites = find_sites(shapes, embedding_rules(shapes), selection)
    whole = {site.path.rpartition("/")[0]: site for site in sites if not site.hideable}
    assert {path: (s.columns, s.fan_in) for path, s in whole.items()} == EMBEDDINGS[name]
    hidden = [site for site in sites if site.hideable]
    assert facts(hidden) == facts(find_sites(shapes, selection=selection))


def test_proxies_hide_whole_columns_of_heads_and_travel_exactly():
    """Fewer key heads, biases, stacked layers and a quantized embedding, all at once."""
    params = random_params(CONFIGS["qwen2"])
    sites = find_sites(params, embedding_rules(params))
    transform = chain(quantize(NormalFloat(4, 4)), client_mask(0.5))

    @jit
    def make(params):
        whole = whole_proxy(params, sites)
        state = transform.init(jax.random.key(0), whole)
        return transform.apply(jax.random.key(1), state, transform.prepare(state, whole))

    proxy = make(params)
    assert_same(wire.decode_proxy(wire.encode_proxy(proxy), Layout.of(proxy)), proxy)
    effective = effective_params(proxy)
    seen = np.asarray(proxy.visible["layers/attention/key/kernel"])
    key = effective["layers"]["attention"]["key"]
    assert seen.shape == (2, 4)
    assert 0 < seen.sum() < seen.size
    assert not np.asarray(key["bias"]).reshape(2, 4)[~seen].any()
    assert not np.asarray(key["kernel"]).reshape(2, 8, 4).swapaxes(1, 2)[~seen].any()
    table = effective["token_embed"]["embedding"]
    np.testing.assert_allclose(table, params["token_embed"]["embedding"], atol=0.2)
    logits = jit(make_language_model(CONFIGS["qwen2"]).apply_fn)(effective, batch_of(), None)
    assert np.isfinite(logits).all()
