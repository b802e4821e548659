"""Payloads of the wire format come back exactly as they were sent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import (
    COMPILE_FAST,
    MODELS,
    assert_same,
    dense_proxy,
    dense_update,
    random_proxy,
    random_values,
    shapes,
)

from fedqsn_jax.protocol import wire
from fedqsn_jax.protocol.layout import Layout, proxy_cost, update_cost
from fedqsn_jax.protocol.proxy import (
    Proxy,
    chain,
    client_mask,
    effective_params,
    identity,
    quantize,
    server_mask,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import NormalFloat, Quantized, Uniform
from fedqsn_jax.protocol.sites import find_sites

QUANTIZERS = st.builds(
    lambda codebook, bits, block, dtype: codebook(bits, block, dtype),
    st.sampled_from([NormalFloat, Uniform]),
    st.integers(1, 8),
    st.sampled_from([1, 4, 64]),
    st.sampled_from(["bfloat16", "float16", "float32"]),
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(MODELS)),
    quantizer=st.none() | QUANTIZERS,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_proxies_come_back_exactly(seed, name, quantizer, dtype):
    proxy = random_proxy(np.random.default_rng(seed), name, quantizer, dtype)
    layout = Layout.of(proxy)
    payload = wire.encode_proxy(proxy)
    assert_same(wire.decode_proxy(payload, layout), proxy)
    counts = {path: int(mask.sum()) for path, mask in proxy.visible.items()}
    assert len(payload) == proxy_cost(layout).of(counts)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(MODELS)),
    quantizer=st.none() | QUANTIZERS,
)
def test_updates_come_back_exactly(seed, name, quantizer):
    # An unquantized proxy is just what a delta is: floats, zero on hidden columns.
    plain = random_proxy(np.random.default_rng(seed), name, None)
    layout = Layout.of(random_proxy(np.random.default_rng(seed), name, quantizer))
    payload = wire.encode_update(plain.params, plain.visible, layout)
    assert_same(wire.decode_update(payload, layout), (plain.params, plain.visible))
    counts = {path: int(mask.sum()) for path, mask in plain.visible.items()}
    assert len(payload) == update_cost(layout).of(counts)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", [NormalFloat, Uniform])
@pytest.mark.parametrize("seen", [[False] * 4, [True] * 4, [True, False, False, True]])
def test_every_width_holds_every_code(bits, codebook, seen):
    codes = (np.arange(4 * 67).reshape(1, 4, 67) * 37 % 2**bits).astype(np.uint8)
    codes = codes.transpose(0, 2, 1) * np.array(seen, np.uint8)
    scales = np.ones((1, 2, 4), jnp.bfloat16) * np.array(seen, jnp.bfloat16)
    sites = find_sites({"up": shapes(kernel=(67, 4))})
    params = {"up": {"kernel": Quantized(codes, scales, codebook(bits, 64))}}
    proxy = Proxy(params, {"up/kernel": np.array([seen])}, {"up/kernel": np.float32(2)}, sites)
    payload = wire.encode_proxy(proxy)
    assert len(payload) == 48 + 1 + 4 + sum(seen) * (math.ceil(67 * bits / 8) + 2 * 2)
    assert_same(wire.decode_proxy(payload, Layout.of(proxy)), proxy)


@pytest.mark.parametrize("quantizer", [None, NormalFloat(4, 4)])
def test_decoded_is_what_the_simulation_sees(quantizer):
    # Three models in one tree: most of this test's time goes to compiling the draws of masks.
    jit = functools.partial(jax.jit, compiler_options=COMPILE_FAST)
    chosen = {name: MODELS[name] for name in ("convolution", "stack", "whole")}
    template = {name: model for name, (model, _) in chosen.items()}
    rules = [f"*/{rule.removeprefix('*/')}" for _, rules in chosen.values() for rule in rules]
    sites = find_sites(template, rules)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(random_values(rng, leaf.shape, "f4")), template)
    first = identity() if quantizer is None else quantize(quantizer)
    transform = chain(first, server_mask(0.3), client_mask(0.3))

    @jit
    def make(params):
        whole = whole_proxy(params, sites)
        state = transform.init(jax.random.key(0), whole)
        return transform.apply(jax.random.key(1), state, transform.prepare(state, whole))

    proxy = make(params)
    layout = Layout.of(jax.eval_shape(make, template))
    assert layout == Layout.of(proxy)
    assert layout.fingerprint == Layout.of(proxy).fingerprint
    decoded = wire.decode_proxy(wire.encode_proxy(proxy), layout)
    assert_same(decoded, proxy)
    effective = jit(effective_params)
    assert_same(effective(decoded), effective(proxy))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(decoded))


def test_large_sites_are_packed_in_slices_that_do_not_show():
    side = 1500  # More codes than one slice holds, 2**20.
    rng = np.random.default_rng(8)
    seen = rng.random((1, side)) < 0.9
    codes = rng.integers(0, 16, (1, side, side), np.uint8) * seen[:, None]
    scales = np.ones((1, 24, side), jnp.bfloat16) * seen[:, None].astype(jnp.bfloat16)
    sites = find_sites({"up": shapes(kernel=(side, side))})
    params = {"up": {"kernel": Quantized(codes, scales, NormalFloat(4, 64))}}
    proxy = Proxy(params, {"up/kernel": seen}, {"up/kernel": np.float32(1)}, sites)
    payload = wire.encode_proxy(proxy)
    nibbles = codes[0].T[seen[0]].reshape(-1, 2)
    start = 48 + math.ceil(side / 8) + 4
    assert payload[start : start + len(nibbles)] == (nibbles @ [1, 16]).astype(np.uint8).tobytes()
    assert_same(wire.decode_proxy(payload, Layout.of(proxy)), proxy)


def test_plain_tensors_of_any_dtype_and_shape_travel_whole():
    plain = {
        "counter": np.int32(-7),
        "empty": np.zeros((0, 3), np.float32),
        "specials": np.array([-0.0, np.nan, np.inf, 1e-45], np.float32),
        "narrow": np.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    }
    dense = dense_proxy()
    proxy = dense.replace(params=dense.params | plain)
    layout = Layout.of(proxy)
    payload = wire.encode_proxy(proxy)
    assert len(payload) - len(wire.encode_proxy(dense)) == 4 + 0 + 16 + 12
    assert_same(wire.decode_proxy(payload, layout), proxy)


def test_numpy_and_jax_arrays_give_the_same_bytes():
    proxy = dense_proxy()
    assert wire.encode_proxy(jax.tree.map(jnp.asarray, proxy)) == wire.encode_proxy(proxy)
    fortran = jax.tree.map(np.asfortranarray, proxy)
    assert wire.encode_proxy(fortran) == wire.encode_proxy(proxy)


def test_updates_of_narrow_floats_arrive_as_float32():
    delta, visible = dense_update()
    layout = Layout.of(dense_proxy())
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), delta)
    # Small integers are exact in bfloat16.
    assert wire.encode_update(narrow, visible, layout) == wire.encode_update(delta, visible, layout)


def test_updates_that_are_not_finite_are_left_to_the_aggregation():
    delta, visible = dense_update()
    delta["norm"]["scale"][0] = np.nan
    layout = Layout.of(dense_proxy())
    decoded, _ = wire.decode_update(wire.encode_update(delta, visible, layout), layout)
    assert np.isnan(decoded["norm"]["scale"][0])
