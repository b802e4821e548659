"""The wire format: payloads hold visible columns only, and nothing damaged gets through.

The files in ``tests/goldens`` pin the bytes of version 1. After a deliberate change of the format
raise ``wire.VERSION`` and write them anew, from the root of the repository::

  python -m tests.wire_test
"""

import ast
import hashlib
import inspect
import math
import pathlib
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_jax import wire
from fedqsn_jax.masking import find_sites
from fedqsn_jax.proxy import (
    Proxy,
    chain,
    client_mask,
    effective_params,
    identity,
    quantize,
    server_mask,
    whole_proxy,
)
from fedqsn_jax.quantization import NormalFloat, Quantized, Uniform

GOLDENS = pathlib.Path(__file__).parent / "goldens"
HEADER = struct.Struct("<4sHBB16sQ16s")


def shapes(**tensors):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in tensors.items()}


# Name: (shapes of the parameters, site rules). The rules spell out what the names do not say.
MODELS = {
    "dense": ({"up": shapes(kernel=(9, 6), bias=(6,)), "norm": shapes(scale=(6,))}, ()),
    "no_bias": ({"up": shapes(kernel=(8, 5)), "down": shapes(kernel=(5, 8))}, ()),
    "convolution": ({"conv": shapes(kernel=(3, 2, 2, 5), bias=(5,))}, ()),
    "attention": (
        {
            "attention": {
                "query": shapes(kernel=(6, 4, 3), bias=(4, 3)),
                "key": shapes(kernel=(6, 2, 3)),
                "out": shapes(kernel=(4, 3, 6), bias=(6,)),
            },
            "norm": shapes(scale=(6,)),
        },
        (),
    ),
    "stack": (
        {
            "layers": {
                "query": shapes(kernel=(3, 4, 2, 3), bias=(3, 2, 3)),
                "out": shapes(kernel=(3, 2, 3, 4), bias=(3, 4)),
                "up": shapes(kernel=(3, 4, 5)),
            },
            "head": shapes(kernel=(4, 2), bias=(2,)),
        },
        (
            "*query/kernel: layer input column column",
            "*out/kernel: layer input input column",
            "*up/kernel: layer input column",
        ),
    ),
    "whole": (
        {"embed": shapes(embedding=(7, 4)), "up": shapes(kernel=(4, 3), bias=(3,))},
        ("*embedding: whole column input",),
    ),
}
QUANTIZERS = st.builds(
    lambda codebook, bits, block, dtype: codebook(bits, block, dtype),
    st.sampled_from([NormalFloat, Uniform]),
    st.integers(1, 8),
    st.sampled_from([1, 4, 64]),
    st.sampled_from(["bfloat16", "float16", "float32"]),
)


def random_values(rng, shape, dtype):
    return rng.normal(size=shape).astype(jnp.dtype(dtype))


def random_proxy(rng, name, quantizer, dtype="float32", absent=0.2):
    """A proxy made by hand: no transform of the package had a part in it, only `find_sites`.

    A third of the masks hide everything, a third nothing; some sites have no mask at all.
    """
    template, rules = MODELS[name]
    sites = find_sites(template, rules)
    visible, scale = {}, {}
    for site in sites:
        if site.hideable and rng.random() >= absent:
            share = rng.choice([0.0, 0.5, 1.0])
            visible[site.path] = rng.random((site.layers, site.columns)) < share
            scale[site.path] = np.float32(rng.uniform(1, 9))
    kernels = {site.path: site for site in sites}
    biases = {site.bias_path: site for site in sites}

    def make(path, leaf):
        site = kernels.get(path) or biases.get(path)
        if site is None:
            return random_values(rng, leaf.shape, dtype)
        layers, inputs, columns = site.layers, site.fan_in, site.columns
        seen = visible.get(site.path, np.ones((layers, columns), bool))
        if path in biases:
            # In all models above, layers come first and columns follow in their own order.
            bias = random_values(rng, (layers, columns), dtype)
            return np.where(seen, bias, np.zeros_like(bias)).reshape(leaf.shape)
        if quantizer is not None:
            blocks = math.ceil(inputs / quantizer.block_size)
            codes = rng.integers(0, 2**quantizer.bits, (layers, inputs, columns), np.uint8)
            scales = np.abs(random_values(rng, (layers, blocks, columns), quantizer.scale_dtype))
            keep = seen[:, None, :]
            return Quantized(
                np.where(keep, codes, 0), np.where(keep, scales, np.zeros_like(scales)), quantizer
            )
        kernel = random_values(rng, (layers, inputs, columns), dtype)
        kernel = np.where(seen[:, None, :], kernel, np.zeros_like(kernel))
        if site.column_axes < site.input_axes:
            kernel = kernel.transpose(0, 2, 1)
        return kernel.reshape(leaf.shape)

    def walk(prefix, tree):
        if not isinstance(tree, dict):
            return make(prefix, tree)
        return {key: walk(f"{prefix}/{key}" if prefix else key, tree[key]) for key in tree}

    return Proxy(walk("", template), visible, scale, sites)


def assert_same(found, expected):
    """Same structure, static fields included, and at each leaf same dtype, shape and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def seal(payload):
    """Gives a tampered payload a correct length and digest, as an attacker can."""
    prefix, body = bytearray(payload[:32]), payload[48:]
    prefix[24:32] = struct.pack("<Q", len(body))
    return bytes(prefix) + hashlib.blake2b(bytes(prefix) + body, digest_size=16).digest() + body


def assert_refused(decode, payload, layout, says=""):
    with pytest.raises(ValueError, match=says) as caught:
        decode(payload, layout)
    assert "\n" not in str(caught.value)


# Goldens: small enough to write their bytes down by hand.


def dense_proxy():
    """Three columns of three inputs in 3 bits, blocks of two; the middle column is hidden."""
    template = {"dense": shapes(kernel=(3, 3), bias=(3,)), "norm": shapes(scale=(2,))}
    codes = np.array([[[1, 0, 5], [2, 0, 0], [7, 0, 3]]], np.uint8)
    scales = np.array([[[1.0, 0, 2.0], [0.5, 0, 0]]]).astype(jnp.bfloat16)
    params = {
        "dense": {
            "kernel": Quantized(codes, scales, NormalFloat(3, 2, "bfloat16")),
            "bias": np.array([0.25, 0, -4], np.float32),
        },
        "norm": {"scale": np.array([1, 3], np.float32)},
    }
    visible = {"dense/kernel": np.array([[True, False, True]])}
    return Proxy(params, visible, {"dense/kernel": np.float32(1.5625)}, find_sites(template))


def dense_update():
    delta = {
        "dense": {
            "kernel": np.array([[1, 0, 2], [3, 0, 4], [5, 0, 6]], np.float32),
            "bias": np.array([7, 0, 8], np.float32),
        },
        "norm": {"scale": np.array([9, 10], np.float32)},
    }
    return delta, dense_proxy().visible


def stacked_proxy():
    """A stack of attention queries in bfloat16, hidden a layer; an embedding in 8 bits, whole."""
    template = {
        "embed": shapes(embedding=(3, 2)),
        "query": shapes(kernel=(2, 2, 2, 2), bias=(2, 2, 2)),
    }
    rules = ("embed/embedding: whole column input", "query/kernel: layer input column column")
    seen = np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool)
    kernel = np.arange(16).reshape(2, 2, 2, 2) * seen.reshape(2, 1, 2, 2)
    bias = (np.arange(8).reshape(2, 4) * seen).reshape(2, 2, 2)
    codes = np.array([[[10, 20, 30], [40, 50, 255]]], np.uint8)
    scales = np.array([[[1, 2, 4]]], np.float32)
    params = {
        "embed": {"embedding": Quantized(codes, scales, Uniform(8, 64, "float32"))},
        "query": {"kernel": kernel.astype(jnp.bfloat16), "bias": bias.astype(np.float16)},
    }
    scale = {"query/kernel": np.float32(2)}
    return Proxy(params, {"query/kernel": seen}, scale, find_sites(template, rules))


def goldens():
    return {
        "proxy_dense.bin": wire.encode_proxy(dense_proxy()),
        "update_dense.bin": wire.encode_update(*dense_update(), wire.Layout.of(dense_proxy())),
        "proxy_stacked.bin": wire.encode_proxy(stacked_proxy()),
    }


BODIES = {
    "proxy_dense.bin": struct.pack(
        "<B f 2f 2B 2B 4H 2f",
        *(0b101, 1.5625),
        *(0.25, -4),
        # 1, 2, 7 and 5, 0, 3, three bits each, the first lowest.
        *(0b11_010_001, 0b1, 0b11_000_101, 0b0),
        # 1, 1/2, 2 and 0 in bfloat16.
        *(0x3F80, 0x3F00, 0x4000, 0x0000),
        *(1, 3),
    ),
    "update_dense.bin": struct.pack("<B 2f 6f 2f", 0b101, 7, 8, 1, 3, 5, 2, 4, 6, 9, 10),
    "proxy_stacked.bin": struct.pack(
        "<B f 6B 3f 5e",
        *(0b1110_0011, 2),
        *(10, 40, 20, 50, 30, 255),
        *(1, 2, 4),
        *(0, 1, 5, 6, 7),
    )
    # In bfloat16, the upper half of float32. Entry (layer, input, head, feature) of the kernel
    # is 8 layer + 4 input + 2 head + feature; a column's two inputs are neighbours here.
    + b"".join(struct.pack("<f", x)[2:] for x in (0, 4, 1, 5, 9, 13, 10, 14, 11, 15)),
}


@pytest.mark.parametrize("name", BODIES)
def test_golden_bytes_are_those_worked_out_by_hand(name):
    payload = (GOLDENS / name).read_bytes()
    magic, version, kind, reserved, _, length, digest = HEADER.unpack_from(payload)
    assert (magic, version, reserved) == (b"FQSN", 1, 0)
    assert kind == (2 if name.startswith("update") else 1)
    assert payload[48:] == BODIES[name]
    assert length == len(BODIES[name])
    assert digest == hashlib.blake2b(payload[:32] + payload[48:], digest_size=16).digest()


def test_goldens_are_what_is_written_and_read():
    for name, payload in goldens().items():
        assert payload == (GOLDENS / name).read_bytes(), name
    for name, proxy in {"dense": dense_proxy(), "stacked": stacked_proxy()}.items():
        golden = (GOLDENS / f"proxy_{name}.bin").read_bytes()
        assert_same(wire.decode_proxy(golden, wire.Layout.of(proxy)), proxy)
    golden = (GOLDENS / "update_dense.bin").read_bytes()
    assert_same(wire.decode_update(golden, wire.Layout.of(dense_proxy())), dense_update())


# Round trips.


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(MODELS)),
    quantizer=st.none() | QUANTIZERS,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_proxies_come_back_exactly(seed, name, quantizer, dtype):
    proxy = random_proxy(np.random.default_rng(seed), name, quantizer, dtype)
    layout = wire.Layout.of(proxy)
    payload = wire.encode_proxy(proxy)
    assert_same(wire.decode_proxy(payload, layout), proxy)
    counts = {path: int(mask.sum()) for path, mask in proxy.visible.items()}
    assert len(payload) == wire.proxy_cost(layout).of(counts)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(MODELS)),
    quantizer=st.none() | QUANTIZERS,
)
def test_updates_come_back_exactly(seed, name, quantizer):
    # An unquantized proxy is just what a delta is: floats, zero on hidden columns.
    plain = random_proxy(np.random.default_rng(seed), name, None)
    layout = wire.Layout.of(random_proxy(np.random.default_rng(seed), name, quantizer))
    payload = wire.encode_update(plain.params, plain.visible, layout)
    assert_same(wire.decode_update(payload, layout), (plain.params, plain.visible))
    counts = {path: int(mask.sum()) for path, mask in plain.visible.items()}
    assert len(payload) == wire.update_cost(layout).of(counts)


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
    assert_same(wire.decode_proxy(payload, wire.Layout.of(proxy)), proxy)


@pytest.mark.parametrize("quantizer", [None, NormalFloat(4, 4)])
def test_decoded_is_what_the_simulation_sees(quantizer):
    # Three models in one tree: most of this test's time goes to compiling the draws of masks.
    chosen = {name: MODELS[name] for name in ("convolution", "stack", "whole")}
    template = {name: model for name, (model, _) in chosen.items()}
    rules = [f"*{rule}" for _, rules in chosen.values() for rule in rules]
    sites = find_sites(template, rules)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(random_values(rng, leaf.shape, "f4")), template)
    first = identity() if quantizer is None else quantize(quantizer)
    transform = chain(first, server_mask(0.3), client_mask(0.3))

    @jax.jit
    def make(params):
        whole = whole_proxy(params, sites)
        state = transform.init(jax.random.key(0), whole)
        return transform.apply(jax.random.key(1), state, transform.prepare(state, whole))

    proxy = make(params)
    layout = wire.Layout.of(jax.eval_shape(make, template))
    assert layout == wire.Layout.of(proxy)
    assert layout.fingerprint == wire.Layout.of(proxy).fingerprint
    decoded = wire.decode_proxy(wire.encode_proxy(proxy), layout)
    assert_same(decoded, proxy)
    effective = jax.jit(effective_params)
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
    assert_same(wire.decode_proxy(payload, wire.Layout.of(proxy)), proxy)


def test_plain_tensors_of_any_dtype_and_shape_travel_whole():
    plain = {
        "counter": np.int32(-7),
        "empty": np.zeros((0, 3), np.float32),
        "specials": np.array([-0.0, np.nan, np.inf, 1e-45], np.float32),
        "narrow": np.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    }
    dense = dense_proxy()
    proxy = dense.replace(params=dense.params | plain)
    layout = wire.Layout.of(proxy)
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
    layout = wire.Layout.of(dense_proxy())
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), delta)
    # Small integers are exact in bfloat16.
    assert wire.encode_update(narrow, visible, layout) == wire.encode_update(delta, visible, layout)


def test_updates_that_are_not_finite_are_left_to_the_aggregation():
    delta, visible = dense_update()
    delta["norm"]["scale"][0] = np.nan
    layout = wire.Layout.of(dense_proxy())
    decoded, _ = wire.decode_update(wire.encode_update(delta, visible, layout), layout)
    assert np.isnan(decoded["norm"]["scale"][0])


# Lengths.


def test_costs_are_those_worked_out_by_hand():
    proxy = stacked_proxy()
    layout = wire.Layout.of(proxy)
    # Header, bitmap, factor, embedding: 6 codes and 3 scales. A column: 2 bfloat16, 1 float16.
    assert wire.proxy_cost(layout) == (48 + 1 + 4 + 6 + 12, {"query/kernel": 4 + 2})
    assert wire.update_cost(layout) == (48 + 1 + 6 * 4, {"query/kernel": 8 + 4})
    assert wire.proxy_cost(layout).of({"query/kernel": 5}) == 101
    unmasked = wire.Layout.of(proxy.replace(visible={}, scale={}))
    assert wire.proxy_cost(unmasked) == (48 + 6 + 12 + 8 * 6, {})


def test_totals_over_clients_follow_from_summed_counts():
    rng = np.random.default_rng(3)
    proxies = [random_proxy(rng, "attention", NormalFloat(4, 4), absent=0) for _ in range(5)]
    fixed, per_column = wire.proxy_cost(wire.Layout.of(proxies[0]))
    summed = {path: sum(int(p.visible[path].sum()) for p in proxies) for path in per_column}
    total = 5 * fixed + sum(per_column[path] * count for path, count in summed.items())
    assert total == sum(len(wire.encode_proxy(proxy)) for proxy in proxies)


@pytest.mark.parametrize("hidden", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("bias", [False, True])
def test_four_bits_take_at_most_4_6_bits_a_visible_parameter(hidden, bias):
    rng = np.random.default_rng(4)
    dense = {"kernel": jnp.asarray(rng.normal(size=(256, 256)), jnp.float32)}
    if bias:
        dense["bias"] = jnp.asarray(rng.normal(size=256), jnp.float32)
    params = {"up": dense}
    transform = chain(quantize(NormalFloat(4, 64)), client_mask(hidden, "fixed_count"))
    whole = whole_proxy(params, find_sites(params))
    state = transform.init(jax.random.key(0), whole)
    proxy = transform.apply(jax.random.key(1), state, transform.prepare(state, whole))
    columns = 256 - round(hidden * 256)
    assert 8 * len(wire.encode_proxy(proxy)) <= 4.6 * 256 * columns


# Invariant 3: what is hidden leaves no trace.


@pytest.mark.parametrize("quantizer", [None, NormalFloat(4, 4)])
def test_hidden_values_of_the_server_leave_no_trace(model, set_hidden, quantizer):
    first = identity() if quantizer is None else quantize(quantizer)
    transform = chain(first, server_mask(0.4), client_mask(0.3))
    whole = whole_proxy(model.params, model.sites)
    state = jax.jit(transform.init)(jax.random.key(5), whole)

    @jax.jit
    def make(params):
        prepared = transform.prepare(state, whole_proxy(params, model.sites))
        return transform.apply(jax.random.key(6), state, prepared)

    def payload(params):
        proxy = make(params)
        return wire.encode_proxy(proxy), proxy.visible

    expected, visible = payload(model.params)
    assert not all(mask.all() for mask in visible.values())
    for value in (np.nan, np.inf, 1e30):
        assert payload(set_hidden(model.params, model.sites, visible, value))[0] == expected
    everything = {path: np.ones_like(mask) for path, mask in visible.items()}
    shown = {path: everything[path] & ~np.asarray(mask) for path, mask in visible.items()}
    assert payload(set_hidden(model.params, model.sites, shown, 1e30))[0] != expected


def test_hidden_values_of_a_client_leave_no_trace(model, set_hidden):
    visible = {site.path: np.arange(site.columns)[None] % 3 > 0 for site in model.sites}
    layout = wire.Layout.of(whole_proxy(model.params, model.sites).replace(visible=visible))
    expected = wire.encode_update(model.params, visible, layout)
    for value in (0.0, np.nan, 1e30):
        changed = set_hidden(model.params, model.sites, visible, value)
        assert wire.encode_update(changed, visible, layout) == expected
    zeroed = set_hidden(model.params, model.sites, visible, 0.0)
    assert_same(wire.decode_update(expected, layout), (zeroed, visible))


def test_wire_imports_nothing_that_holds_secrets():
    tree = ast.parse(inspect.getsource(wire))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    own = {name for name in imported if name.startswith("fedqsn_jax")}
    allowed = ("masking", "proxy", "quantization", "types")
    assert own == {f"fedqsn_jax.{name}" for name in allowed}


# Whatever is wrong with a payload is a ValueError of one line.


@pytest.mark.parametrize("name", BODIES)
def test_any_changed_byte_is_noticed(name):
    payload = (GOLDENS / name).read_bytes()
    decode = wire.decode_update if name.startswith("update") else wire.decode_proxy
    layout = wire.Layout.of(stacked_proxy() if "stacked" in name else dense_proxy())
    for position in range(len(payload)):
        for flipped in (0x01, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[position] ^= flipped
            assert_refused(decode, bytes(damaged), layout, "payload: ")


@pytest.mark.parametrize("name", BODIES)
def test_any_other_length_is_noticed(name):
    payload = (GOLDENS / name).read_bytes()
    decode = wire.decode_update if name.startswith("update") else wire.decode_proxy
    layout = wire.Layout.of(stacked_proxy() if "stacked" in name else dense_proxy())
    others = [payload[:length] for length in range(len(payload))]
    others += [payload + bytes(count) for count in (1, 2, 1000)] + [payload + payload]
    for other in others:
        assert_refused(decode, other, layout, "payload: ")
        if len(other) >= 48:
            assert_refused(decode, seal(other), layout, "payload: .* expected")


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(MODELS)),
    edits=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=8),
)
def test_forged_bodies_give_a_wellformed_proxy_or_a_value_error(seed, name, edits):
    """The digest has no key, so a forger can make it right: the decoder trusts nothing."""
    proxy = random_proxy(np.random.default_rng(seed), name, NormalFloat(3, 4), absent=0)
    layout = wire.Layout.of(proxy)
    payload = wire.encode_proxy(proxy)
    forged = bytearray(payload)
    for position, flipped in edits:
        forged[48 + position % (len(payload) - 48)] ^= flipped
    try:
        decoded = wire.decode_proxy(seal(bytes(forged)), layout)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
        return
    assert jax.tree.structure(decoded) == jax.tree.structure(proxy)
    is_quantized = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
    for leaf in jax.tree.leaves(decoded.params, is_leaf=is_quantized):
        if is_quantized(leaf):
            assert np.asarray(leaf.codes).max() < 8
            scales = np.asarray(leaf.scales, np.float32)
            assert np.isfinite(scales).all()
            assert (scales >= 0).all()
    # Hidden columns are zero: encoding what was decoded keeps all that a payload can say.
    assert_same(wire.decode_proxy(wire.encode_proxy(decoded), layout), decoded)


FACTOR, SCALE = 48 + 1, 48 + 1 + 4 + 8 + 4
BFLOAT16 = {"negative": 0xBF80, "infinite": 0x7F80, "nan": 0x7FC0, "signalling nan": 0x7F81}


@pytest.mark.parametrize("bits", BFLOAT16.values(), ids=BFLOAT16)
@pytest.mark.parametrize(
    ("offset", "says"), [(SCALE, "a scale of 'dense/kernel'"), (FACTOR + 2, "a site's factor")]
)
def test_forged_scales_are_refused(bits, offset, says):
    # The upper half of a float32 is a bfloat16, so one pattern serves scales and factors.
    forged = bytearray((GOLDENS / "proxy_dense.bin").read_bytes())
    forged[offset : offset + 2] = struct.pack("<H", bits)
    says = f"payload: {says} is negative or not finite"
    assert_refused(wire.decode_proxy, seal(bytes(forged)), wire.Layout.of(dense_proxy()), says)


def test_unused_bits_of_a_bitmap_are_zero():
    layout = wire.Layout.of(dense_proxy())
    for name, decode in (("proxy", wire.decode_proxy), ("update", wire.decode_update)):
        forged = bytearray((GOLDENS / f"{name}_dense.bin").read_bytes())
        forged[48] |= 0b1000
        assert_refused(
            decode, seal(bytes(forged)), layout, "bitmap of 'dense/kernel' damaged, expected 3 bits"
        )


@pytest.mark.parametrize(
    ("start", "replacement", "says"),
    [
        (0, b"GIF8", "not a FedQSN payload, expected one that starts with b'FQSN'"),
        (4, struct.pack("<H", 258), "version 258, expected 1"),
        (6, b"\2", "an update, expected a proxy"),
        (6, b"\7", "unknown, expected a proxy"),
        (7, b"\1", "not a FedQSN payload"),
        (8, bytes(16), "made for another model structure"),
        (24, struct.pack("<Q", 2**63), "a body of 33 bytes, expected 9223372036854775808"),
        (32, bytes(16), "damaged"),
    ],
)
def test_messages_name_what_is_wrong_in_a_header(start, replacement, says):
    payload = (GOLDENS / "proxy_dense.bin").read_bytes()
    changed = payload[:start] + replacement + payload[start + len(replacement) :]
    assert_refused(wire.decode_proxy, changed, wire.Layout.of(dense_proxy()), f"payload: {says}")


@pytest.mark.parametrize("payload", [None, 3, "text", [1, 2], bytearray(60), memoryview(b"FQSN")])
def test_what_is_not_bytes_is_refused(payload):
    layout = wire.Layout.of(dense_proxy())
    says = f"payload: expected bytes, got {type(payload).__name__}"
    assert_refused(wire.decode_proxy, payload, layout, says)
    assert_refused(wire.decode_update, payload, layout, says)


def test_a_header_that_claims_much_allocates_nothing():
    side = 2**20
    sites = find_sites({"up": shapes(kernel=(side, side))})
    kernel = jax.ShapeDtypeStruct((side, side), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, side), jnp.bool_)
    layout = wire.Layout.of(Proxy({"up": {"kernel": kernel}}, {"up/kernel": mask}, {}, sites))
    length = wire.proxy_cost(layout).of({"up/kernel": side}) - 48
    assert length == side // 8 + 4 * side**2

    def header(length):
        return struct.pack("<4sHBB16sQ", b"FQSN", 1, 1, 0, layout.fingerprint, length) + bytes(16)

    full_bitmap = b"\xff" * (side // 8)
    # What was sent bounds what is allocated: a bitmap in full costs a few bytes a column.
    cases = [
        (header(length), 2**16),
        (header(2**64 - 1), 2**16),
        (seal(header(0)), 2**16),
        (seal(header(0) + full_bitmap), 8 * side),
        (seal(header(0) + full_bitmap + bytes(64)), 8 * side),
    ]
    for payload, limit in cases:
        tracemalloc.start()
        try:
            assert_refused(wire.decode_proxy, payload, layout, "payload: ")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < limit


# Layouts.


def test_fingerprints_tell_structures_apart_and_ignore_values():
    def layout(codebook=NormalFloat, bits=4, block=64, dtype="bfloat16", masked=True, **changes):
        settings = {"inputs": 6, "bias": True, "bias_dtype": "float32", "norm": 4} | changes
        inputs, norm = settings["inputs"], settings["norm"]
        quantizer = codebook(bits, block, dtype)
        template = {
            "up": shapes(kernel=(inputs, 4), **({"bias": (4,)} if settings["bias"] else {}))
        }
        blocks = -(-inputs // block)
        codes, scales = np.zeros((1, inputs, 4), np.uint8), np.zeros((1, blocks, 4), dtype)
        up = {"kernel": Quantized(codes, scales.astype(jnp.dtype(dtype)), quantizer)}
        if settings["bias"]:
            up["bias"] = np.zeros(4, jnp.dtype(settings["bias_dtype"]))
        visible = {"up/kernel": np.ones((1, 4), bool)} if masked else {}
        scale = {"up/kernel": np.float32(1)} if settings.get("scaled", masked) else {}
        params = {"up": up, "norm": np.zeros(norm, np.float32)}
        return wire.Layout.of(Proxy(params, visible, scale, find_sites(template)))

    changes = [
        {},
        {"codebook": Uniform},
        {"bits": 3},
        {"block": 2},
        {"dtype": "float16"},
        {"masked": False},
        {"scaled": False},
        {"inputs": 7},
        {"bias": False},
        {"bias_dtype": "float16"},
        {"norm": 5},
    ]
    fingerprints = [layout(**change).fingerprint for change in changes]
    assert len(set(fingerprints)) == len(changes)
    assert {len(fingerprint) for fingerprint in fingerprints} == {16}
    rng = np.random.default_rng(7)
    one, other = (random_proxy(rng, "stack", NormalFloat(4, 4), absent=0) for _ in range(2))
    assert wire.Layout.of(one).fingerprint == wire.Layout.of(other).fingerprint


def test_which_axes_are_columns_is_part_of_the_fingerprint():
    params = {"up": {"kernel": np.zeros((4, 4), np.float32)}}
    rules = ("up/kernel: input column", "up/kernel: column input", "up/kernel: whole input column")
    found = {
        wire.Layout.of(
            whole_proxy(params, find_sites({**params, "other": shapes(kernel=(4, 4))}, [rule]))
        ).fingerprint
        for rule in rules
    }
    assert len(found) == len(rules)


def test_a_payload_for_another_structure_is_refused():
    says = "another model structure"
    payload = wire.encode_proxy(stacked_proxy())
    assert_refused(wire.decode_proxy, payload, wire.Layout.of(dense_proxy()), says)
    unmasked = wire.Layout.of(dense_proxy().replace(visible={}, scale={}))
    assert_refused(wire.decode_proxy, wire.encode_proxy(dense_proxy()), unmasked, says)


# What cannot be encoded.


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_no_payload_is_made_that_no_client_would_accept(value):
    proxy = dense_proxy()
    factor = proxy.replace(scale={"dense/kernel": np.float32(value)})
    with pytest.raises(ValueError, match="a site's factor is negative or not finite"):
        wire.encode_proxy(factor)
    proxy.params["dense"]["kernel"].scales[0, 1, 2] = value
    with pytest.raises(ValueError, match="a scale of 'dense/kernel' is negative or not finite"):
        wire.encode_proxy(proxy)


def test_masks_of_another_shape_or_dtype_are_refused():
    for mask in (np.ones((1, 4), bool), np.ones(3, bool), np.ones((1, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"mask of 'dense/kernel' .* expected bool\[1, 3\]"):
            wire.encode_proxy(dense_proxy().replace(visible={"dense/kernel": mask}))


def test_updates_that_do_not_fit_the_layout_are_refused():
    layout = wire.Layout.of(dense_proxy())
    delta, visible = dense_update()
    short = delta | {"norm": {"scale": np.zeros(1, np.float32)}}
    with pytest.raises(ValueError, match=r"'norm/scale' is \(1,\), expected \(2,\)"):
        wire.encode_update(short, visible, layout)
    with pytest.raises(ValueError, match=r"'norm/scale' is absent, expected \(2,\)"):
        wire.encode_update({"dense": delta["dense"]}, visible, layout)
    with pytest.raises(ValueError, match=r"'other' is \(1,\), expected absent"):
        wire.encode_update(delta | {"other": np.zeros(1, np.float32)}, visible, layout)
    with pytest.raises(ValueError, match=r"masks of \[\], expected \['dense/kernel'\]"):
        wire.encode_update(delta, {}, layout)


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    for file_name, contents in goldens().items():
        (GOLDENS / file_name).write_bytes(contents)
