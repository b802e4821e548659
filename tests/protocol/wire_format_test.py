"""Version 1 of the wire format: its bytes, its lengths and the fingerprints of layouts."""

import hashlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wire_cases import (
    BODIES,
    GOLDENS,
    assert_refused,
    assert_same,
    dense_proxy,
    dense_update,
    goldens,
    random_proxy,
    shapes,
    stacked_proxy,
)

from fedqsn_jax.protocol import wire
from fedqsn_jax.protocol.layout import Layout, proxy_cost, update_cost
from fedqsn_jax.protocol.proxy import Proxy, chain, client_mask, quantize, whole_proxy
from fedqsn_jax.protocol.quantization import NormalFloat, Quantized, Uniform
from fedqsn_jax.protocol.sites import find_sites

HEADER = struct.Struct("<4sHBB16sQ16s")


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
        assert_same(wire.decode_proxy(golden, Layout.of(proxy)), proxy)
    golden = (GOLDENS / "update_dense.bin").read_bytes()
    assert_same(wire.decode_update(golden, Layout.of(dense_proxy())), dense_update())


# Lengths.


def test_costs_are_those_worked_out_by_hand():
    proxy = stacked_proxy()
    layout = Layout.of(proxy)
    # Header, bitmap, factor, embedding: 6 codes and 3 scales. A column: 2 bfloat16, 1 float16.
    assert proxy_cost(layout) == (48 + 1 + 4 + 6 + 12, {"query/kernel": 4 + 2})
    assert update_cost(layout) == (48 + 1 + 6 * 4, {"query/kernel": 8 + 4})
    assert proxy_cost(layout).of({"query/kernel": 5}) == 101
    unmasked = Layout.of(proxy.replace(visible={}, scale={}))
    assert proxy_cost(unmasked) == (48 + 6 + 12 + 8 * 6, {})


def test_totals_over_clients_follow_from_summed_counts():
    rng = np.random.default_rng(3)
    proxies = [random_proxy(rng, "attention", NormalFloat(4, 4), absent=0) for _ in range(5)]
    fixed, per_column = proxy_cost(Layout.of(proxies[0]))
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
        return Layout.of(Proxy(params, visible, scale, find_sites(template)))

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
    assert Layout.of(one).fingerprint == Layout.of(other).fingerprint


def test_which_axes_are_columns_is_part_of_the_fingerprint():
    params = {"up": {"kernel": np.zeros((4, 4), np.float32)}}
    rules = ("up/kernel: input column", "up/kernel: column input", "up/kernel: whole input column")
    found = {
        Layout.of(
            whole_proxy(params, find_sites({**params, "other": shapes(kernel=(4, 4))}, [rule]))
        ).fingerprint
        for rule in rules
    }
    assert len(found) == len(rules)


def test_a_payload_for_another_structure_is_refused():
    says = "another model structure"
    payload = wire.encode_proxy(stacked_proxy())
    assert_refused(wire.decode_proxy, payload, Layout.of(dense_proxy()), says)
    unmasked = Layout.of(dense_proxy().replace(visible={}, scale={}))
    assert_refused(wire.decode_proxy, wire.encode_proxy(dense_proxy()), unmasked, says)
