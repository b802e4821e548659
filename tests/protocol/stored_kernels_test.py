"""Frozen kernels that stay codes: the model computes with what clients receive, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedqsn_jax.core.trees import combine, exclude, leaves_by_path, select
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import (
    chain,
    client_mask,
    effective_params,
    quantize,
    server_mask,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.sites import find_sites
from fedqsn_jax.protocol.stored_kernels import (
    StoredKernel,
    column_factors,
    select_stored,
    split_stored,
    storable_kernels,
    stored_kernels,
    with_stored_kernels,
)
from fedqsn_jax.protocol.wire import decode_proxy, encode_proxy

LAYERS, WIDTH = 3, 6
TRANSFORM = chain(quantize(NormalFloat(4, 4)), server_mask(0.3), client_mask(0.3))


class Layer(nn.Module):
    """Attention's shapes of kernels, and a norm that is trained."""

    @nn.compact
    def __call__(self, hidden, _):
        inner = nn.DenseGeneral((2, 5), name="query")(nn.RMSNorm(name="norm")(hidden))
        out = nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="out")
        return hidden + out(jnp.tanh(inner)), None


class Stack(nn.Module):
    """Layers in a scan."""

    @nn.compact
    def __call__(self, hidden):
        scanned = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return scanned(name="layers")(hidden, None)[0]


def apply_fn(params, batch, key):
    del key
    return Stack().apply({"params": params}, batch["x"])


@pytest.fixture(scope="module")
def case():
    batch = {"x": jax.random.normal(jax.random.key(1), (4, WIDTH))}
    params = jax.jit(Stack().init)(jax.random.key(0), batch["x"])["params"]
    # Scales that are no normal numbers, and large ones, are computed with in another way.
    kernel = params["layers"]["out"]["kernel"]
    params["layers"]["out"]["kernel"] = kernel.at[1, :, :, 0].mul(1e-39)
    sites = find_sites(params)
    whole = whole_proxy(params, sites)
    state = TRANSFORM.init(jax.random.key(2), whole)
    prepared = TRANSFORM.prepare(state, whole)
    proxy = TRANSFORM.apply(jax.random.key(3), state, prepared)
    return batch, params, sites, prepared, proxy


def stored_params(case):
    """What a model computes with: codes before client masks, and a client's factors."""
    _, _, sites, prepared, proxy = case
    factors = column_factors(proxy.visible, proxy.scale, sites)
    stored = stored_kernels(select_stored(prepared.params), factors, sites)
    plain, _ = split_stored(proxy)
    return combine(effective_params(plain), stored)


def test_kernels_are_what_clients_decode_bit_for_bit(case):
    proxy = case[-1]
    decoded = effective_params(decode_proxy(encode_proxy(proxy), Layout.of(proxy)))
    stored = stored_params(case)
    for name in ("query", "out"):
        kernel, expected = stored["layers"][name]["kernel"], decoded["layers"][name]["kernel"]
        assert isinstance(kernel, StoredKernel)
        assert np.asarray(kernel.unbox()).tobytes() == np.asarray(expected).tobytes()
        for layer in range(LAYERS):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], kernel)
            assert np.asarray(one.unbox()).tobytes() == np.asarray(expected[layer]).tobytes()
    assert any(not np.asarray(seen).all() for seen in proxy.visible.values())


def test_a_kernel_that_is_no_codes_is_scaled_where_it_is_seen(case):
    _, params, sites, _, _ = case
    site = sites.by_kernel["layers/query/kernel"]
    kernel = params["layers"]["query"]["kernel"].astype(jnp.bfloat16)
    factors = jnp.ones((LAYERS, 10), jnp.float32).at[:, 3].set(0).at[:, 4].set(2.5)
    spoiled = kernel.at[:, :, 0, 3].set(jnp.nan)
    values = StoredKernel(spoiled, factors, site).unbox()
    expected = kernel.astype(jnp.float32) * factors.reshape(LAYERS, 1, 2, 5)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(StoredKernel(kernel, None, site).unbox(), kernel)


def test_the_model_computes_as_with_whole_kernels_and_keeps_no_layers_values(case):
    batch, params, sites, _, proxy = case
    trained = frozenset({"layers/norm/scale"})
    paths = storable_kernels(apply_fn, params, batch, sites, trained)
    assert paths == {"layers/query/kernel", "layers/out/kernel"}
    assert storable_kernels(apply_fn, params, batch, sites, None) == frozenset()
    model = with_stored_kernels(apply_fn)

    def loss(some, rest):
        return jnp.square(model(combine(some, rest), batch, None)).sum()

    results = []
    for whole in (effective_params(proxy), stored_params(case)):
        some, rest = select(whole, trained), exclude(whole, trained)
        results.append(jax.jit(jax.value_and_grad(loss))(some, rest))
        shapes = saved(loss, some, rest)
    (plain, slopes), (ours, our_slopes) = results
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    for path, slope in leaves_by_path(slopes).items():
        np.testing.assert_allclose(leaves_by_path(our_slopes)[path], slope, rtol=1e-5)
    kernels = {(LAYERS, WIDTH, 2, 5), (LAYERS, 2, 5, WIDTH)}
    assert not {shape for shape, dtype in shapes if dtype == "float32"} & kernels


def saved(loss, some, rest):
    """Shapes and dtypes of what going forward keeps for going backward."""
    kept = jax.eval_shape(lambda some, rest: jax.vjp(lambda s: loss(s, rest), some)[1], some, rest)
    return {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(kept)}
