"""Low-rank adapters: as a parameterisation, and under masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from language_cases import CONFIGS, batch_of, jit, random_params

from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.models.functional import linen_apply
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.protocol.lora import find_adapters
from fedqsn_jax.protocol.low_rank import adapt
from fedqsn_jax.protocol.masks import draw_masks
from fedqsn_jax.protocol.proxy import (
    chain,
    client_mask,
    dequantize_proxy,
    effective_params,
    quantize,
    server_mask,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.sites import Sites, find_sites

RANK, ALPHA = 2, 5.0
KEY = jax.random.key(0)

# Name: (shape, rule or None where the package knows, NumPy's product of A and B).
LAYOUTS = {
    "dense/kernel": ((7, 6), None, "ir,rc->ic"),
    "query/kernel": ((7, 2, 3), None, "ir,rhd->ihd"),
    "out/kernel": ((2, 3, 5), None, "hdr,ro->hdo"),
    "conv/kernel": ((3, 2, 4, 5), None, "xyir,ro->xyio"),
    "layers/query/kernel": ((3, 7, 2, 4), None, "lir,lrhd->lihd"),
    "layers/out/kernel": ((3, 2, 4, 5), None, "lhdr,lro->lhdo"),
    "layers/mlp/up/kernel": ((3, 7, 6), None, "lir,lrc->lic"),
    "transposed/table": ((6, 7), "transposed/table: column input", "ir,rc->ci"),
}
RULES = tuple(rule for _, rule, _ in LAYOUTS.values() if rule)


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def random_like(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


@pytest.fixture(scope="module")
def layouts():
    """Parameters of every layout, their adapters, and both merged, at the start and at random."""
    shapes = {path: np.zeros(shape, np.float32) for path, (shape, _, _) in LAYOUTS.items()}
    params = random_like(nested(shapes | {"dense/bias": np.zeros(6, np.float32)}))
    lora = find_adapters(params, RULES, (), RANK, ALPHA)
    merge = jit(lora.merge)
    start = jit(lora.add)(KEY, params)
    later = random_like(start)
    return params, start, merge(start), later, merge(later)


def test_the_start_is_the_model_itself(layouts):
    params, adapted, merged, _, _ = layouts
    assert len(jax.tree.leaves(adapted)) == len(jax.tree.leaves(params)) + 2 * len(LAYOUTS)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    # A is random with variance one over the inputs.
    add = find_adapters(params, RULES, ("dense/kernel",), 4000, 1.0).add
    first, second = (jit(add)(key, params)["dense"] for key in jax.random.split(KEY))
    np.testing.assert_allclose(np.var(first["kernel_lora_a"]), 1 / 7, rtol=0.05)
    assert (np.asarray(first["kernel_lora_a"]) != np.asarray(second["kernel_lora_a"])).all()
    np.testing.assert_array_equal(first["kernel"], params["dense"]["kernel"])


@pytest.mark.parametrize("path", LAYOUTS)
def test_merged_is_numpys_low_rank_product(path, layouts):
    adapted, merged = map(leaves_by_path, layouts[-2:])
    a, b = (np.asarray(adapted[f"{path}_lora_{letter}"], np.float64) for letter in "ab")
    expected = adapted[path] + ALPHA / RANK * np.einsum(LAYOUTS[path][2], a, b)
    np.testing.assert_allclose(merged[path], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged["dense/bias"], adapted["dense/bias"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hidden_matrix_of_a_language_model_is_adapted(name):
    """And merging gives back the model's own structure, shapes and dtypes."""
    shapes = jax.eval_shape(make_language_model(CONFIGS[name]).init, KEY)
    lora = find_adapters(shapes, (), (), RANK, ALPHA)
    hideable = [site.path for site in find_sites(shapes) if site.hideable]
    assert [adapter.matrix.path for adapter in lora.adapters] == hideable
    merged = jax.eval_shape(lambda params: lora.merge(lora.add(KEY, params)), shapes)
    assert merged == shapes
    queries = find_adapters(shapes, (), ("*/query/kernel", "*/value/kernel"), RANK, ALPHA)
    assert len(queries.adapters) == 2 * sum(path.endswith("query/kernel") for path in hideable)


def test_a_language_model_computes_with_the_merged_matrices():
    """Merged or not, logits are those of the plain model with NumPy's matrices."""
    model, params = make_language_model(CONFIGS["llama"]), random_params(CONFIGS["llama"])
    lora = find_adapters(params, (), ("*/query/kernel", "*/out/kernel"), RANK, ALPHA)
    adapted = random_like(jax.eval_shape(lora.add, KEY, params))
    attention = jax.tree.map(np.asarray, adapted["layers"]["attention"])
    for name, equation in (("query", "lir,lrhd->lihd"), ("out", "lhdr,lro->lhdo")):
        product = np.einsum(equation, *(attention[name][f"kernel_lora_{x}"] for x in "ab"))
        attention[name] = {"kernel": attention[name]["kernel"] + ALPHA / RANK * product}
    by_hand = {**adapted, "layers": {**adapted["layers"], "attention": attention}}
    batch = batch_of()
    unmerged, merged = adapt(lora, model.apply_fn, adapted, batch)
    assert merged.adapters == ()

    @jit
    def logits(adapted, by_hand):
        functions = (lora.adapt(model.apply_fn), unmerged)
        return model.apply_fn(by_hand, batch, None), *(f(adapted, batch, None) for f in functions)

    expected, *found = logits(adapted, by_hand)
    for one in found:
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


# Under masks.


@pytest.fixture(scope="module")
def masked():
    """Two adapted matrices with a bias; the sites of the model with adapters."""
    params = {
        "query": {"kernel": np.zeros((7, 2, 3)), "bias": np.zeros((2, 3))},
        "layers": {"mlp": {"up": {"kernel": np.zeros((2, 7, 5))}}},
    }
    params = random_like(jax.tree.map(np.float32, params))
    lora = find_adapters(params, (), (), RANK, ALPHA)
    sites = lora.sites(find_sites(params), quantize=False, public=False)
    return random_like(jax.eval_shape(lora.add, KEY, params), 3), lora, sites


def matrices(tree):
    """The two matrices, columns last, in float64."""
    return {
        "query/kernel": np.asarray(tree["query"]["kernel"], np.float64).reshape(1, 7, 6),
        "layers/mlp/up/kernel": np.asarray(tree["layers"]["mlp"]["up"]["kernel"], np.float64),
    }


def products(tree):
    query, up = tree["query"], tree["layers"]["mlp"]["up"]
    first = np.einsum("ir,rhd->ihd", query["kernel_lora_a"], query["kernel_lora_b"])
    second = np.einsum("lir,lrc->lic", up["kernel_lora_a"], up["kernel_lora_b"])
    return {"query/kernel": first.reshape(1, 7, 6), "layers/mlp/up/kernel": second}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_client_computes_with_adapted_visible_columns(masked, quantized):
    """``(Q(W)_j + s A B_j) / kappa`` where visible, and nothing where hidden."""
    params, lora, sites = masked
    stages = [server_mask(0.3), client_mask(0.4)]
    if quantized:
        stages.insert(0, quantize(NormalFloat(4, 4)))
    transform = chain(*stages)

    @jit
    def draw(params):
        whole = whole_proxy(params, sites)
        state = transform.init(KEY, whole)
        received = transform.apply(jax.random.key(1), state, transform.prepare(state, whole))
        before = dequantize_proxy(stages[0].prepare((), whole) if quantized else whole)
        return received, lora.merge(effective_params(received)), before

    received, effective, before = draw(params)
    assert set(received.visible) == set(matrices(params))
    for name in ("kernel_lora_a", "kernel_lora_b"):
        np.testing.assert_array_equal(before.params["query"][name], params["query"][name])
    adapted = {
        path: matrices(before.params)[path] + ALPHA / RANK * product
        for path, product in products(params).items()
    }
    for path, matrix in matrices(effective).items():
        seen = np.asarray(received.visible[path])[:, None, :]
        expected = np.where(seen, adapted[path] / (0.7 * 0.6), 0)
        np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-5)
        assert 0 < seen.mean() < 1


def test_the_expectation_over_masks_is_the_adapted_matrix(masked):
    params, lora, sites = masked
    transform = chain(server_mask(0.3), client_mask(0.4))

    @jit
    def mean(keys):
        def one(key):
            whole = whole_proxy(params, sites)
            state = transform.init(key, whole)
            proxy = transform.apply(jax.random.fold_in(key, 1), state, whole)
            proxy = transform.prepare(state, proxy)
            return lora.merge(effective_params(proxy))

        return jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.vmap(one)(keys))

    draws = 4000
    found = matrices(mean(jax.random.split(KEY, draws)))
    for path, product in products(params).items():
        whole = matrices(params)[path] + ALPHA / RANK * product
        # A visible column is 1/kappa times itself, with probability kappa.
        error = np.abs(whole) * np.sqrt((1 / 0.42 - 1) / draws)
        assert (np.abs(found[path] - whole) < 5 * error + 1e-5).all()


def test_an_adapter_draws_no_masks_of_its_own_unless_the_base_is_public(masked):
    params, lora, sites = masked
    drawn = jax.eval_shape(lambda: draw_masks(KEY, sites, 0.5))
    assert set(drawn) == {"query/kernel", "layers/mlp/up/kernel"}
    plain = find_sites(jax.eval_shape(lora.merge, params))
    up = "layers/mlp/up/kernel"

    def facts(sites):
        return {s.path: (s.hideable, s.layers, s.fan_in, s.columns) for s in sites}

    assert facts(lora.sites(plain, quantize=True, public=True)) == {
        "query/kernel_lora_a": (False, 1, 7, 2),
        "query/kernel_lora_b": (True, 1, 2, 6),
        f"{up}_lora_a": (False, 2, 7, 2),
        f"{up}_lora_b": (True, 2, 2, 5),
    }
    # As FedLPP has it: blocks through all of a layer's A, and of its B.
    assert facts(lora.sites(plain, quantize=True, public=True, flat=True)) == {
        "query/kernel_lora_a": (False, 1, 14, 1),
        "query/kernel_lora_b": (False, 1, 12, 1),
        f"{up}_lora_a": (False, 2, 14, 1),
        f"{up}_lora_b": (False, 2, 10, 1),
    }
    # Where the matrix is no site, its adapter is none either.
    assert lora.sites(Sites(), quantize=False, public=False) == Sites()


def test_mistakes_are_told():
    params = {"a": {"kernel": jnp.zeros((2, 3))}}
    with pytest.raises(ValueError, match="'x/kernel' fits no matrix; allowed are patterns of: a/"):
        find_adapters(params, (), ("x/kernel",), 2, 1.0)
    lora = find_adapters(params, (), (), 2, 1.0)
    with pytest.raises(ValueError, match="a/kernel_lora_a: the name is an adapter's"):
        lora.add(KEY, lora.add(KEY, params))
    module = jax.tree_util.Partial(lambda: None, params["a"]["kernel"])
    named = find_adapters({"kernel": module}, ("*: input column",), (), 2, 1.0)
    with pytest.raises(ValueError, match="must stand in a dictionary"):
        named.add(KEY, {"kernel": module})


def test_dense_layers_need_no_merging():
    """Scanned stacks, attention's axes and all: what they compute is as if merged."""
    model, params = make_language_model(CONFIGS["t5"]), random_params(CONFIGS["t5"])
    lora = find_adapters(params, (), (), RANK, 0.1)
    adapted = random_like(jax.eval_shape(lora.add, KEY, params))
    apply_fn, merged = adapt(lora, model.apply_fn, adapted, batch_of())
    assert merged.adapters == ()

    @jit
    def both(params):
        batch = batch_of()
        return apply_fn(params, batch, None), model.apply_fn(lora.merge(params), batch, None)

    one, other = both(adapted)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())
    plain = jit(model.apply_fn)(adapted, batch_of(), None)
    assert np.abs(one - plain).max() > 0.01 * np.abs(other).max()


class _Mixed(nn.Module):
    """A convolution, a dense layer, one whose rule makes its rows the columns, and a product."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(3, (2, 2), name="conv")(images).mean(axis=(1, 2))
        x = nn.Dense(4, name="turned")(nn.tanh(nn.Dense(5, name="dense")(x)))
        return x @ self.param("own", nn.initializers.ones, (4, 2))


def test_what_is_no_dense_layer_is_merged():
    module, images = _Mixed(), jnp.ones((2, 4, 4, 1))
    shapes = jax.eval_shape(module.init, KEY, images)["params"]
    rules = ("turned/kernel: column input", "own: input column")
    lora = find_adapters(shapes, rules, (), RANK, ALPHA)
    params = random_like(jax.eval_shape(lora.add, KEY, shapes))
    batch = {"image": images}
    apply_fn, merged = adapt(lora, linen_apply(module), params, batch)
    assert [one.matrix.path for one in merged.adapters] == ["conv/kernel", "own", "turned/kernel"]
    expected = jit(lambda params: linen_apply(module)(lora.merge(params), batch, None))(params)
    found = jit(lambda params: apply_fn(params, batch, None))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    def no_module(params, batch, key):
        return batch["image"].sum() * params["own"]

    assert adapt(lora, no_module, params, batch)[1].adapters == lora.adapters
