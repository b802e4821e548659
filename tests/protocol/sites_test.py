"""Mask sites: which kernels have columns, and how they are laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.core.trees import exact_pattern, leaves_by_path, path_of
from fedqsn_jax.protocol.masks import draw_masks, hide, spread
from fedqsn_jax.protocol.sites import (
    MaskSite,
    Sites,
    embedding_rules,
    find_sites,
    parse_rule,
)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def layer(kernel, bias=None):
    return {"kernel": zeros(*kernel)} | ({} if bias is None else {"bias": zeros(*bias)})


def by_path(sites):
    return {site.path: site for site in sites}


def axes_of(site):
    return site.layer_axes, site.input_axes, site.column_axes


ATTENTION = {
    "attention": {
        "query": layer((6, 4, 3), (4, 3)),
        "key": layer((6, 2, 3), (2, 3)),
        "value": layer((6, 2, 3)),
        "out": layer((4, 3, 6), (6,)),
    },
    "mlp": {"up": layer((6, 12), (12,)), "down": layer((12, 6), (6,))},
}


def test_finds_dense_layers_but_not_head_embedding_and_norm():
    params = {
        "dense": layer((4, 5), (5,)),
        "lm_head": layer((5, 7), (7,)),
        "classifier": {"dense": layer((5, 7), (7,))},
        "logits": layer((5, 7)),
        "embed_tokens": {"embedding": zeros(9, 4), "kernel": zeros(9, 4)},
        "final_norm": {"scale": zeros(4), "bias": zeros(4)},
    }
    (site,) = find_sites(params)
    assert site == MaskSite("dense/kernel", (4, 5), (), (0,), (1,), "dense/bias", True)
    assert (site.layers, site.fan_in, site.columns) == (1, 4, 5)


def test_finds_a_kernel_without_a_module_around_it():
    (site,) = find_sites(layer((4, 5), (5,)))
    assert (site.path, site.bias_path) == ("kernel", "bias")


def test_accepts_shapes_in_place_of_arrays():
    params = {"dense": layer((4, 5), (5,))}
    assert find_sites(jax.eval_shape(lambda: params)) == find_sites(params)


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((3, 3, 2, 4), (0, 1, 2)), ((3, 2, 4), (0, 1)), ((3, 3, 3, 2, 4), (0, 1, 2, 3))],
)
def test_finds_convolutions(shape, inputs):
    (site,) = find_sites({"conv_0": layer(shape, (4,))})
    assert axes_of(site) == ((), inputs, (len(shape) - 1,))
    assert site.fan_in == np.prod(shape[:-1])
    assert site.bias_path == "conv_0/bias"


def test_a_model_s_sites_are_looked_up_by_path():
    sites = find_sites({"up": layer((4, 5), (5,)), "down": layer((5, 4))})
    down, up = sites
    follower = dataclasses.replace(down, path="down/kernel_lora_b", follows="down/kernel")
    frozen = dataclasses.replace(up, path="other", bias_path=None, quantized=False, hideable=False)
    more = Sites((*sites, follower, frozen))
    assert (more.of("up/kernel"), more.of("up/bias"), more.of("down/bias")) == (up, up, None)
    assert more.masked_by({"down/kernel"}) == (down, follower)
    assert more.drawing == sites
    assert more.quantized == (down, up, follower)
    assert more.tensors == {"up/kernel", "up/bias", "down/kernel", follower.path, "other"}
    assert hash(Sites(more)) == hash(more)
    assert repr(sites) == repr(tuple(sites)), "payloads' fingerprints are made of it"


def test_finds_attention_with_fewer_key_heads():
    sites = by_path(find_sites(ATTENTION))
    assert len(sites) == 6
    query, key = sites["attention/query/kernel"], sites["attention/key/kernel"]
    assert axes_of(query) == axes_of(key) == ((), (0,), (1, 2))
    assert (query.fan_in, query.columns, key.columns) == (6, 12, 6)
    assert query.bias_path == "attention/query/bias"
    assert sites["attention/value/kernel"].bias_path is None
    out = sites["attention/out/kernel"]
    assert axes_of(out) == ((), (0, 1), (2,))
    assert (out.fan_in, out.columns, out.bias_path) == (12, 6, "attention/out/bias")


def test_residual_selection_keeps_what_writes_to_the_residual_stream():
    sites = find_sites(ATTENTION, selection="residual")
    assert set(by_path(sites)) == {"attention/out/kernel", "mlp/down/kernel"}
    sites = find_sites(ATTENTION, ["mlp/up/kernel: input column"], selection="residual")
    assert set(by_path(sites)) == {"attention/out/kernel", "mlp/down/kernel", "mlp/up/kernel"}


def test_rules_describe_a_scanned_stack_and_a_fused_kernel():
    params = {
        "layers": {"up": layer((5, 4, 7), (5, 7)), "qkv": layer((5, 4, 3, 2, 2), (5, 3, 2, 2))},
        "other": layer((4, 4), (4,)),
    }
    rules = [
        "layers/up/*: layer input column",
        "layers/qkv/kernel: layer input column column column",
    ]
    sites = by_path(find_sites(params, rules))
    up, fused = sites["layers/up/kernel"], sites["layers/qkv/kernel"]
    assert (up.layers, up.fan_in, up.columns, up.bias_shape) == (5, 4, 7, (5, 7))
    assert (fused.layers, fused.fan_in, fused.columns, fused.bias_shape) == (5, 4, 12, (5, 3, 2, 2))
    assert up.bias_path == "layers/up/bias"
    assert fused.bias_path == "layers/qkv/bias"
    assert axes_of(sites["other/kernel"]) == ((), (0,), (1,))


def test_user_rules_override_defaults_and_the_first_decides():
    params = {"a": layer((4, 5), (5,)), "b": layer((4, 5), (5,)), "lm_head": layer((5, 3), (3,))}
    sites = by_path(
        find_sites(
            params, ["a/kernel: column input", "b/kernel: none", "*head/kernel: input column"]
        )
    )
    assert set(sites) == {"a/kernel", "lm_head/kernel"}
    assert axes_of(sites["a/kernel"]) == ((), (1,), (0,))
    assert sites["a/kernel"].bias_path is None, "a bias that does not index the columns is none"
    sites = by_path(find_sites(params, ["a/kernel: none", "[ab]/kernel: column input"]))
    assert set(sites) == {"b/kernel"}


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*", {"head/kernel", "a/head/kernel", "a/b/head/kernel", "overhead/kernel", "a/b/w"}),
        ("*/kernel", {"head/kernel", "a/head/kernel", "a/b/head/kernel", "overhead/kernel"}),
        ("head/kernel", {"head/kernel"}),
        ("*/head/kernel", {"head/kernel", "a/head/kernel", "a/b/head/kernel"}),
        ("**/Head/kernel", {"head/kernel", "a/head/kernel", "a/b/head/kernel"}),
        ("*head/kernel", {"head/kernel", "overhead/kernel"}),
        ("*/*head/kernel", {"head/kernel", "a/head/kernel", "a/b/head/kernel", "overhead/kernel"}),
        ("a/*", {"a/head/kernel", "a/b/head/kernel", "a/b/w"}),
        ("a/*/kernel", {"a/head/kernel", "a/b/head/kernel"}),
        ("?/head/[jk]ernel", {"a/head/kernel"}),
        ("*/b/*", {"a/b/head/kernel", "a/b/w"}),
        ("*/w", {"a/b/w"}),
    ],
)
def test_patterns_match_whole_names(pattern, matched):
    """A star beside letters stays inside a name; one alone stands for any number of names."""
    params = {
        "head": layer((2, 3)),
        "overhead": layer((2, 3)),
        "a": {"head": layer((2, 3)), "b": {"head": layer((2, 3)), "w": zeros(2, 3)}},
    }
    # Sites of the rule run along the second axis, those of the package's rules along the first.
    sites = find_sites(params, [f"{pattern}: column input"])
    assert {site.path for site in sites if site.input_axes == (1,)} == matched


def test_names_that_only_end_like_a_head_are_hidden():
    names = ("overhead", "monologits", "monkey", "readout", "Head", "lm_head", "LMHead")
    params = {"block": {name: layer((4, 5), (5,)) for name in names}}
    sites = by_path(find_sites(params))
    hidden = {f"block/{name}/kernel" for name in ("overhead", "monologits", "monkey", "readout")}
    assert set(sites) == hidden
    for name in ("monkey", "readout"):
        with pytest.raises(ValueError, match=f"no rule says which axes of '{name}/kernel'"):
            find_sites({name: layer((4, 2, 3))})


def test_rules_match_without_regard_to_case_and_only_the_right_rank():
    params = {"Attn": {"Query": layer((6, 2, 3)), "w": zeros(3, 4)}, "x": layer((2, 3))}
    sites = by_path(find_sites(params, ["attn/*: column input"]))
    assert axes_of(sites["Attn/w"]) == ((), (1,), (0,))
    assert axes_of(sites["Attn/Query/kernel"]) == ((), (0,), (1, 2))


def test_whole_makes_a_site_that_is_never_hidden():
    params = {"embed": {"embedding": zeros(9, 4)}, "dense": layer((4, 5), (5,))}
    sites = by_path(find_sites(params, ["embed/embedding: whole column input"]))
    embedding = sites["embed/embedding"]
    assert (embedding.hideable, embedding.fan_in, embedding.columns) == (False, 4, 9)
    masks = draw_masks(jax.random.key(0), Sites(sites.values()), 0.5)
    assert set(masks) == {"dense/kernel"}


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "kernel",
        ": input column",
        "kernel:",
        "kernel: input",
        "kernel: column",
        "kernel: layer column",
        "kernel: inputs column",
        "kernel: input column whole",
        "kernel: none none",
        "kernel: whole",
        "kernel: whole none",
        "kernel: input none column",
        "kernel input column",
    ],
)
def test_malformed_rules_are_refused(rule):
    with pytest.raises(ValueError, match="site rule") as error:
        find_sites({"dense": layer((4, 5))}, [rule])
    assert repr(rule) in str(error.value)


def test_parse_rule_splits_at_the_last_colon():
    assert parse_rule(" a:b/kernel :  whole layer input column") == (
        "a:b/kernel",
        ("whole", "layer", "input", "column"),
    )


def test_rules_that_match_nothing_and_models_without_sites_are_refused():
    params = {"dense": layer((4, 5))}
    for rule in ("missing/kernel: input column", "dense/kernel: input input column"):
        with pytest.raises(ValueError, match=r"matches no tensor.*dense/kernel"):
            find_sites(params, [rule])
    for rules in (["dense/kernel: none"], ["dense/kernel: whole input column"]):
        with pytest.raises(ValueError, match="no mask site found"):
            find_sites(params, rules)
    with pytest.raises(ValueError, match="no mask site found"):
        find_sites(params, selection="residual")


def test_paths_join_keys_of_every_kind():
    tree = {"a": [zeros(1), {"kernel": zeros(2)}], "b": (zeros(3),)}
    assert {path: leaf.size for path, leaf in leaves_by_path(tree).items()} == {
        "a/0": 1,
        "a/1/kernel": 2,
        "b/0": 3,
    }
    assert path_of((jax.tree_util.DictKey("x"), jax.tree_util.SequenceKey(3))) == "x/3"


# Facts about columns over trees.


def test_spread_lays_columns_over_kernels_and_biases():
    params = {"a": layer((2, 3), (3,)), "stack": layer((2, 4, 3), (2, 3)), "b": layer((3, 2), (2,))}
    sites = find_sites(params, ["stack/kernel: layer input column"])
    columns = {
        "a/kernel": jnp.asarray([[1.0, 2, 3]]),
        "stack/kernel": jnp.arange(6.0).reshape(2, 3),
    }
    result = spread(columns, params, sites, "absent")
    assert result["b"] == {"kernel": "absent", "bias": "absent"}
    np.testing.assert_array_equal(result["a"]["kernel"], [[1, 2, 3]])
    np.testing.assert_array_equal(result["a"]["bias"], [1, 2, 3])
    np.testing.assert_array_equal(result["stack"]["kernel"], np.arange(6.0).reshape(2, 1, 3))
    np.testing.assert_array_equal(result["stack"]["bias"], np.arange(6.0).reshape(2, 3))


def test_hide_zeroes_whatever_columns_hold(model, set_hidden):
    masks = draw_masks(jax.random.key(0), model.sites, 0.5)
    assert any(not np.asarray(mask).all() for mask in masks.values())
    expected = set_hidden(model.params, model.sites, masks, 0.0)
    for value in (np.nan, np.inf, 1.0):
        filled = set_hidden(model.params, model.sites, masks, value)
        jax.tree.map(np.testing.assert_array_equal, hide(filled, model.sites, masks), expected)


def test_scanned_attention_is_known_and_other_stacks_are_refused():
    """A leading layer axis must not be taken for an input axis, nor a stack travel unnoticed."""
    shapes = {"query": (3, 8, 2, 4), "key": (3, 8, 2, 4), "out": (3, 2, 4, 8)}
    params = {name: {"kernel": np.zeros(shape)} for name, shape in shapes.items()}
    facts = {site.path: (site.layers, site.fan_in, site.columns) for site in find_sites(params)}
    assert facts == {path + "/kernel": (3, 8, 8) for path in shapes}
    params["up"] = {"kernel": np.zeros((3, 8, 16))}
    with pytest.raises(ValueError, match="no rule says which axes of 'up/kernel'"):
        find_sites(params)
    rules = ["up/kernel: layer input column"]
    assert {site.path for site in find_sites(params, rules)} == {*facts, "up/kernel"}


@pytest.mark.parametrize(
    ("head", "twin"), [("l[2]", "l2"), ("Dense", "dense"), ("a*", "ab"), ("a: x", "a"), ("x ", "x")]
)
def test_a_rule_of_an_exact_path_leaves_alone_what_is_called_alike(head, twin):
    """Generated rules must not exempt a layer whose name their own would fit as a pattern."""
    params = {name: layer((4, 4), (4,)) for name in (head, twin)}

    sites = find_sites(params, [f"{exact_pattern(f'{head}/kernel')}: none"])

    assert [site.path for site in sites] == [f"{twin}/kernel"]


def test_rules_of_embeddings_name_their_own_paths_only():
    params = {
        "embed[0]": {"embedding": zeros(9, 4)},
        "embed0": {"embedding": zeros(4, 9), "kernel": zeros(4, 4)},
        "b": layer((4, 4)),
    }
    sites = by_path(find_sites(params, embedding_rules(params)))
    assert set(sites) == {"embed[0]/embedding", "embed0/embedding", "b/kernel"}
