"""One contract for every proxy transform and every algorithm, and what each adds to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.protocol import algorithms, proxy
from fedqsn_jax.protocol.lora import find_adapters
from fedqsn_jax.protocol.proxy import (
    chain,
    client_mask,
    dequantize_proxy,
    effective_params,
    identity,
    is_quantized,
    quantize,
    server_mask,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import NormalFloat, Quantized, Uniform
from fedqsn_jax.protocol.quantization import quantize as quantize_matrices
from fedqsn_jax.protocol.sites import find_sites

NF4, NF2 = NormalFloat(4, 4), NormalFloat(2, 4)
RULES = ["stack/kernel: layer input column", "embed/embedding: whole column input"]
HIDEABLE = {"query/kernel", "stack/kernel"}
FAST = {"xla_backend_optimization_level": 0}
"""Programs that run for a moment: most of a test's time would be their compilation."""
KEYS = jax.random.split(jax.random.key(1), 3)
SERVER_KEY = jax.random.key(2)

# Per name: the transform, and the factors (p1, p2) and sampling that its scale must follow.
TRANSFORMS = {
    "identity": (identity(), 0, 0, ""),
    "quantize_normal_float": (quantize(NF4), 0, 0, ""),
    "quantize_uniform": (quantize(Uniform(2, 64)), 0, 0, ""),
    "server_mask": (server_mask(0.4), 0.4, 0, "bernoulli"),
    "server_mask_fixed": (server_mask(0.4, "fixed_count"), 0.4, 0, "fixed_count"),
    "client_mask": (client_mask(0.3), 0, 0.3, "bernoulli"),
    "client_mask_fixed": (client_mask(0.3, "fixed_count"), 0, 0.3, "fixed_count"),
    "chain_of_none": (chain(), 0, 0, ""),
    "quantize_between_masks": (
        chain(server_mask(0.4), quantize(NF2), client_mask(0.3)),
        0.4,
        0.3,
        "bernoulli",
    ),
    "quantize_last": (
        chain(client_mask(0.3), server_mask(0.4), chain(quantize(Uniform(2, 4)))),
        0.4,
        0.3,
        "bernoulli",
    ),
    "fedavg": (algorithms.fedavg().transform, 0, 0, ""),
    "fedsn": (algorithms.fedsn(0.4, 0.3).transform, 0.4, 0.3, "bernoulli"),
    "fedq": (algorithms.fedq(NF2).transform, 0, 0, ""),
    "fedqsn": (algorithms.fedqsn(NF4, 0.4, 0.3).transform, 0.4, 0.3, "bernoulli"),
    "fedlpp": (algorithms.fedlpp(NF2).transform, 0, 0, ""),
    "fedqsn_fixed": (
        algorithms.fedqsn(NF2, 0.4, 0.3, "fixed_count").transform,
        0.4,
        0.3,
        "fixed_count",
    ),
}


def make_params():
    rng = np.random.default_rng(0)
    shapes = {
        "embed": {"embedding": (6, 5)},
        "head": {"kernel": (5, 3), "bias": (3,)},
        "query": {
            "kernel": (5, 2, 3),
            "bias": (2, 3),
            "kernel_lora_a": (5, 2),
            "kernel_lora_b": (2, 2, 3),
        },
        "stack": {
            "kernel": (2, 5, 4),
            "bias": (2, 4),
            "kernel_lora_a": (2, 5, 2),
            "kernel_lora_b": (2, 2, 4),
        },
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def make_sites():
    """The plain model's, and of two adapters: one that is quantized, one that is not."""
    sites = find_sites(PARAMS, RULES)
    query, stack = (
        find_adapters(PARAMS, RULES, (f"{name}/kernel",), 2, 2.0) for name in ("query", "stack")
    )
    sites = query.sites(sites, quantize=False, public=False)
    return stack.sites(sites, quantize=True, public=False)


PARAMS = make_params()
SITES = make_sites()
ORIGINALS = jax.device_get(leaves_by_path(PARAMS))


def draw(transform, server_key, client_keys, params):
    """The prepared proxy, the clients' proxies, and these by way of a dequantized one."""
    whole = whole_proxy(params, SITES)
    state = transform.init(server_key, whole)
    prepared = transform.prepare(state, whole)

    def one(key, prepared):
        return transform.apply(key, state, prepared)

    received = jax.vmap(one, in_axes=(0, None))(client_keys, prepared)
    return {
        "state": state,
        "prepared": prepared,
        "received": received,
        "masked_then_dequantized": jax.vmap(dequantize_proxy)(received),
        "dequantized_then_masked": jax.vmap(one, in_axes=(0, None))(
            client_keys, dequantize_proxy(prepared)
        ),
    }


def octets(tree):
    """Every byte of a tree, with its structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]
    return structure, [(leaf.shape, leaf.dtype, leaf.tobytes()) for leaf in leaves]


def program(transform):
    """What a transform computes, as text."""
    return str(jax.make_jaxpr(lambda *a: draw(transform, *a))(SERVER_KEY, KEYS, PARAMS))


def client(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def check_zero_where_hidden(one):
    sites = {site.path: site for site in SITES}
    biases = {site.bias_path: site for site in SITES if site.bias_path}
    for path, leaf in leaves_by_path(one.params, is_leaf=is_quantized).items():
        site = sites.get(path) or biases.get(path)
        if site is None or site.mask_path not in one.visible:
            continue
        for layer, column in np.argwhere(~np.asarray(one.visible[site.mask_path])):
            if isinstance(leaf, Quantized):
                assert not np.asarray(leaf.codes)[layer, :, column].any()
                assert not np.asarray(leaf.scales)[layer, :, column].any()
            elif path in sites:
                flat = np.asarray(leaf).reshape(site.layers, site.fan_in, site.columns)
                assert not flat[layer, :, column].any()
            else:
                assert not np.asarray(leaf).reshape(site.layers, site.columns)[layer, column].any()


def check_facts(one, p1, p2, sampling):
    """Masks of the hideable sites and no others; the scale is 1/kappa, realised if counted."""
    assert set(one.visible) == set(one.scale) == (HIDEABLE if p1 or p2 else set())
    for site in SITES:
        if site.path not in one.visible:
            continue
        visible = np.asarray(one.visible[site.path])
        assert visible.shape == (site.layers, site.columns)
        assert visible.dtype == bool
        shares = [1 - p1, 1 - p2]
        if sampling == "fixed_count":
            shares = [1 - round(p * site.columns) / site.columns for p in (p1, p2)]
        if sampling == "fixed_count" and not (p1 and p2):
            realised = visible.mean(axis=1)
            np.testing.assert_allclose(realised, np.full(site.layers, np.prod(shares)), rtol=1e-6)
        scale = one.scale[site.path]
        assert scale.shape == ()
        assert scale.dtype == jnp.float32
        np.testing.assert_allclose(scale, 1 / np.prod(shares), rtol=1e-6)


@functools.cache
def whole_codes(quantizer, path):
    site = next(site for site in SITES if site.path == path)
    return jax.device_get(quantize_matrices(quantizer, site.to_matrices(ORIGINALS[path])))


def check_values(one, quantized):
    """Visible entries are the server's own, or the codes and scales of the whole kernel."""
    for path, leaf in leaves_by_path(one.params, is_leaf=is_quantized).items():
        original = ORIGINALS[path]
        site = next((site for site in SITES if path in (site.path, site.bias_path)), None)
        expected = quantized and site is not None and path == site.path and site.quantized
        assert isinstance(leaf, Quantized) == expected
        if site is None:
            np.testing.assert_array_equal(leaf, original)
            continue
        visible = one.visible.get(site.mask_path, np.ones((site.layers, site.columns), bool))
        if isinstance(leaf, Quantized):
            expected = whole_codes(leaf.quantizer, path)
            pairs = [(leaf.codes, expected.codes), (leaf.scales, expected.scales)]
        elif path == site.path:
            pairs = [(site.to_matrices(leaf), site.to_matrices(original))]
        else:
            pairs = [(site.from_bias(leaf)[:, None], site.from_bias(original)[:, None])]
        for mine, its in pairs:
            np.testing.assert_array_equal(
                mine.transpose(0, 2, 1)[visible], its.transpose(0, 2, 1)[visible]
            )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_contract(name, set_hidden):
    transform, p1, p2, sampling = TRANSFORMS[name]
    compiled = jax.jit(lambda *arguments: draw(transform, *arguments), compiler_options=FAST)
    result = jax.device_get(compiled(SERVER_KEY, KEYS, PARAMS))
    prepared, received = result["prepared"], result["received"]

    quantized = any(map(is_quantized, jax.tree.leaves(prepared.params, is_leaf=is_quantized)))
    check_zero_where_hidden(prepared)
    for index in range(len(KEYS)):
        one = client(received, index)
        check_zero_where_hidden(one)
        check_facts(one, p1, p2, sampling)
        check_values(one, quantized)
        for path, seen in prepared.visible.items():
            assert not (np.asarray(one.visible[path]) & ~np.asarray(seen)).any()
    jax.tree.map(
        np.testing.assert_array_equal,
        result["dequantized_then_masked"],
        result["masked_then_dequantized"],
    )

    # Invariant 3: no byte depends on what is hidden, NaN included.
    for value in (np.nan, 7.0):
        changed = set_hidden(PARAMS, SITES, prepared.visible, value)
        assert octets(compiled(SERVER_KEY, KEYS, changed)) == octets(result)
    one = client(received, 0)
    changed = set_hidden(PARAMS, SITES, one.visible, np.nan)
    assert octets(
        client(jax.device_get(compiled(SERVER_KEY, KEYS, changed)["received"]), 0)
    ) == octets(one)

    # Keys decide everything: the same again, in any batch, compiled or not; other keys differ.
    whole = whole_proxy(PARAMS, SITES)
    state = transform.init(SERVER_KEY, whole)
    assert octets(state) == octets(result["state"])
    assert octets(transform.prepare(state, whole)) == octets(prepared)
    alone = transform.apply(KEYS[1], state, prepared)
    assert octets(alone) == octets(client(received, 1))
    order = np.array([2, 0, 1])
    shuffled = compiled(SERVER_KEY, KEYS[order], PARAMS)
    assert octets(shuffled["received"]) == octets(client(received, order))
    other = compiled(jax.random.key(3), KEYS, PARAMS)
    assert (octets(other["state"]) != octets(result["state"])) == (p1 > 0)
    assert (octets(client(received, 0)) != octets(client(received, 1))) == (p2 > 0)

    # Structures, shapes and dtypes are the same in any round, so that nothing is compiled twice.
    shapes = jax.eval_shape(
        lambda *arguments: draw(transform, *arguments), SERVER_KEY, KEYS, PARAMS
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), other
    )
    assert compiled._cache_size() == 1

    # A chain of one is its element.
    single = jax.eval_shape(lambda: draw(chain(transform), SERVER_KEY, KEYS, PARAMS))
    assert jax.tree.leaves(single) == jax.tree.leaves(shapes)
    arguments = (SERVER_KEY, KEYS, PARAMS)
    program = jax.make_jaxpr(lambda *a: draw(transform, *a))(*arguments)
    of_one = jax.make_jaxpr(lambda *a: draw(chain(transform), *a))(*arguments)
    assert str(of_one) == str(program)


@pytest.mark.parametrize(
    "transform",
    [
        server_mask(0),
        server_mask(0.0, "fixed_count"),
        client_mask(0.0),
        chain(),
        chain(server_mask(0.0), client_mask(0)),
        algorithms.fedavg().transform,
        algorithms.fedsn(0.0, 0.0).transform,
        algorithms.Algorithm("fedqsn", None, 0.0, 0.0, "fixed_count").transform,
    ],
)
def test_probability_zero_is_the_same_program_as_identity(transform):
    assert program(transform) == program(identity())
    assert program(transform) != program(server_mask(0.1))


def test_every_public_transform_is_in_the_contract():
    """A new factory of transforms must be added to the contract."""
    factories = {
        name
        for name, value in vars(proxy).items()
        if callable(value)
        and getattr(value, "__annotations__", {}).get("return") is proxy.ProxyTransform
    }
    assert factories == {"identity", "chain", "quantize", "server_mask", "client_mask"}


def test_draws_do_not_depend_on_neighbours():
    """A mask is the same alone and in any chain."""
    whole = whole_proxy(PARAMS, SITES)
    alone = server_mask(0.4).init(SERVER_KEY, whole)
    chained = chain(quantize(NF4), client_mask(0.3), server_mask(0.4)).init(SERVER_KEY, whole)
    assert octets(chained[2]) == octets(alone)
    mask = client_mask(0.3).apply(KEYS[0], (), whole).visible
    both = chain(server_mask(0.4), client_mask(0.3))
    state = both.init(SERVER_KEY, whole)
    visible = both.apply(KEYS[0], state, both.prepare(state, whole)).visible
    for path in HIDEABLE:
        np.testing.assert_array_equal(visible[path], mask[path] & alone[path])


@pytest.mark.parametrize("twice", [server_mask(0.4), client_mask(0.3), quantize(NF2)])
def test_a_chain_does_nothing_twice(twice):
    """Two masks of a kind would be the same draw."""
    (name,) = twice.steps
    for transforms in ((twice, twice), (twice, chain(identity(), twice))):
        with pytest.raises(ValueError, match=f"^chain: {name} stands in it 2 times; allowed is 1$"):
            chain(*transforms)
    # Nothing done twice is nothing done.
    assert chain(identity(), server_mask(0.0), server_mask(0.0), twice).steps == (name,)


def test_effective_params_multiply_visible_columns_by_one_over_kappa():
    whole = whole_proxy(PARAMS, SITES)
    transform = chain(server_mask(0.4), client_mask(0.3))
    state = transform.init(SERVER_KEY, whole)
    received = transform.apply(KEYS[0], state, transform.prepare(state, whole))
    result = effective_params(received)
    factor = {path: np.asarray(seen) / (0.6 * 0.7) for path, seen in received.visible.items()}
    query, stack = factor["query/kernel"], factor["stack/kernel"]
    expected = {
        "query": {"kernel": query.reshape(1, 2, 3), "bias": query.reshape(2, 3)},
        "stack": {"kernel": stack[:, None, :], "bias": stack},
    }
    for name, layer in expected.items():
        for leaf, factors in layer.items():
            np.testing.assert_allclose(result[name][leaf], PARAMS[name][leaf] * factors, rtol=1e-6)
    for name in ("embed", "head"):
        jax.tree.map(np.testing.assert_array_equal, result[name], PARAMS[name])


def test_traced_probabilities_give_the_same_proxies():
    """A probability that is swept without recompiling; then zero cannot be elided."""

    @functools.partial(jax.jit, compiler_options=FAST)
    def traced(p1, p2):
        return draw(chain(server_mask(p1), client_mask(p2)), SERVER_KEY, KEYS, PARAMS)["received"]

    fixed = draw(chain(server_mask(0.4), client_mask(0.3)), SERVER_KEY, KEYS, PARAMS)["received"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), traced(0.4, 0.3), fixed)
    for leaf in jax.tree.leaves(traced(0.0, 0.0).visible):
        assert np.asarray(leaf).all()


def test_make_algorithm_takes_what_it_uses():
    settings = (NF4, 0.4, 0.3, "fixed_count")
    assert algorithms.make_algorithm("fedavg", *settings) == algorithms.fedavg()
    assert algorithms.make_algorithm("fedq", *settings) == algorithms.fedq(NF4)
    assert algorithms.make_algorithm("fedsn", *settings) == algorithms.fedsn(
        0.4, 0.3, "fixed_count"
    )
    assert algorithms.make_algorithm("fedqsn", *settings) == algorithms.fedqsn(*settings)
    assert algorithms.make_algorithm("fedlpp", *settings) == algorithms.fedlpp(NF4)
    with pytest.raises(ValueError, match="'nothing': allowed are fedavg, fedsn, fedq, fedqsn, fed"):
        algorithms.make_algorithm("nothing", *settings)
