"""Whatever is wrong with a payload is a ValueError of one line; nothing wrong is ever encoded."""

import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import (
    BODIES,
    GOLDENS,
    MODELS,
    assert_refused,
    assert_same,
    dense_proxy,
    dense_update,
    random_proxy,
    seal,
    shapes,
    stacked_proxy,
)

from fedqsn_jax.protocol import wire
from fedqsn_jax.protocol.layout import Layout, proxy_cost
from fedqsn_jax.protocol.proxy import Proxy
from fedqsn_jax.protocol.quantization import NormalFloat, Quantized, SymmetricNormalFloat, Uniform
from fedqsn_jax.protocol.sites import find_sites


@pytest.mark.parametrize("name", BODIES)
def test_any_changed_byte_is_noticed(name):
    payload = (GOLDENS / name).read_bytes()
    decode = wire.decode_update if name.startswith("update") else wire.decode_proxy
    layout = Layout.of(stacked_proxy() if "stacked" in name else dense_proxy())
    for position in range(len(payload)):
        for flipped in (0x01, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[position] ^= flipped
            assert_refused(decode, bytes(damaged), layout, "payload: ")


@pytest.mark.parametrize("name", BODIES)
def test_any_other_length_is_noticed(name):
    payload = (GOLDENS / name).read_bytes()
    decode = wire.decode_update if name.startswith("update") else wire.decode_proxy
    layout = Layout.of(stacked_proxy() if "stacked" in name else dense_proxy())
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
    quantizer=st.sampled_from([NormalFloat(3, 4), SymmetricNormalFloat(2, 4), Uniform(5, 3)]),
    edits=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=8),
)
def test_forged_bodies_give_a_wellformed_proxy_or_a_value_error(seed, name, quantizer, edits):
    """The digest has no key, so a forger can make it right: the decoder trusts nothing."""
    proxy = random_proxy(np.random.default_rng(seed), name, quantizer, absent=0)
    layout = Layout.of(proxy)
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
            assert np.asarray(leaf.codes).max() < len(quantizer.levels)
            scales = np.asarray(leaf.scales, np.float32)
            assert np.isfinite(scales).all()
            assert (scales >= 0).all()
    # One proxy has one encoding.
    assert wire.encode_proxy(decoded) == seal(bytes(forged))
    assert_same(wire.decode_proxy(wire.encode_proxy(decoded), layout), decoded)


FACTOR, SCALE = 48 + 1, 48 + 1 + 4 + 8 + 4
BFLOAT16 = {
    "negative": 0xBF80,
    "negative zero": 0x8000,
    "infinite": 0x7F80,
    "nan": 0x7FC0,
    "signalling nan": 0x7F81,
}


@pytest.mark.parametrize("bits", BFLOAT16.values(), ids=BFLOAT16)
@pytest.mark.parametrize(
    ("offset", "says"), [(SCALE, "a scale of 'dense/kernel'"), (FACTOR + 2, "a site's factor")]
)
def test_forged_scales_are_refused(bits, offset, says):
    # The upper half of a float32 is a bfloat16, so one pattern serves scales and factors.
    forged = bytearray((GOLDENS / "proxy_dense.bin").read_bytes())
    forged[offset : offset + 2] = struct.pack("<H", bits)
    says = f"payload: {says} is negative or not finite"
    assert_refused(wire.decode_proxy, seal(bytes(forged)), Layout.of(dense_proxy()), says)


def _one_column(quantizer, codes):
    sites = find_sites({"up": shapes(kernel=(len(codes), 1))})
    scales = np.ones((1, quantizer.blocks(len(codes)), 1), jnp.dtype(quantizer.scale_dtype))
    leaf = Quantized(np.asarray(codes, np.uint8).reshape(1, -1, 1), scales, quantizer)
    return Proxy({"up": {"kernel": leaf}}, {}, {}, sites)


@pytest.mark.parametrize(("bits", "inputs"), [(2, 7), (4, 6), (4, 3)])
def test_every_bit_of_codes_has_one_meaning(bits, inputs):
    """Of ``bits + 1`` bits there are ``2**bits + 1`` levels; other codes stand for nothing."""
    quantizer = SymmetricNormalFloat(bits, 64)
    proxy = _one_column(quantizer, [1] * inputs)
    layout, payload = Layout.of(proxy), wire.encode_proxy(proxy)
    accepted = 0
    for place in range(48, len(payload) - 2):
        for value in range(256):
            forged = seal(payload[:place] + bytes([value]) + payload[place + 1 :])
            try:
                decoded = wire.decode_proxy(forged, layout)
            except ValueError:
                continue
            assert wire.encode_proxy(decoded) == forged
            assert np.asarray(decoded.params["up"]["kernel"].codes).max() <= 2**bits
            accepted += 1
    assert 0 < accepted < 256 * (len(payload) - 50)


def test_codes_that_are_no_level_and_unused_bits_are_refused():
    quantizer = SymmetricNormalFloat(4, 64)
    proxy = _one_column(quantizer, [16, 0, 0])
    layout, payload = Layout.of(proxy), wire.encode_proxy(proxy)
    wrong = bytes([payload[48] | 0b10001]) + payload[49:]
    says = "payload: a code of 'up/kernel' is 17, expected one of the 17 levels"
    assert_refused(wire.decode_proxy, seal(payload[:48] + wrong), layout, says)
    wrong = bytes([payload[49] | 0x80]) + payload[50:]
    says = "payload: codes of 'up/kernel' damaged, expected unused bits to be zero"
    assert_refused(wire.decode_proxy, seal(payload[:49] + wrong), layout, says)
    with pytest.raises(ValueError, match="a code of 'up/kernel' is 31, expected one of the 17"):
        wire.encode_proxy(_one_column(quantizer, [31, 0, 0]))


def test_unused_bits_of_a_bitmap_are_zero():
    layout = Layout.of(dense_proxy())
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
    assert_refused(wire.decode_proxy, changed, Layout.of(dense_proxy()), f"payload: {says}")


@pytest.mark.parametrize("payload", [None, 3, "text", [1, 2], bytearray(60), memoryview(b"FQSN")])
def test_what_is_not_bytes_is_refused(payload):
    layout = Layout.of(dense_proxy())
    says = f"payload: expected bytes, got {type(payload).__name__}"
    assert_refused(wire.decode_proxy, payload, layout, says)
    assert_refused(wire.decode_update, payload, layout, says)


def test_a_header_that_claims_much_allocates_nothing():
    side = 2**20
    sites = find_sites({"up": shapes(kernel=(side, side))})
    kernel = jax.ShapeDtypeStruct((side, side), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, side), jnp.bool_)
    layout = Layout.of(Proxy({"up": {"kernel": kernel}}, {"up/kernel": mask}, {}, sites))
    length = proxy_cost(layout).of({"up/kernel": side}) - 48
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
    layout = Layout.of(dense_proxy())
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
