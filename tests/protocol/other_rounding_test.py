"""Entries near a border that are rounded by a secret of each client's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds_cases import FEDQSN, KEY, fast, federate

from fedqsn_jax.config.schema import ConfigError, resolve
from fedqsn_jax.core.keys import client_round_key, leak_tracing_key
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import (
    chain,
    dequantize_proxy,
    identity,
    quantize,
    round_by_key,
    rounding_bits,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import (
    NormalFloat,
    SymmetricNormalFloat,
    Uniform,
    dequantize,
    quantize_other_way,
)
from fedqsn_jax.protocol.quantization import quantize as quantize_matrices
from fedqsn_jax.protocol.wire import decode_proxy, encode_proxy
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_optimizer import unscheduled

MARGIN = 0.3
TRACED = dataclasses.replace(FEDQSN, tracing_margin=MARGIN)


def column(values):
    return jnp.asarray(values, jnp.float32)[None, :, None]


def test_the_other_side_of_each_border_by_hand():
    """Levels -1, -1/3, 1/3, 1; borders at -2/3, 0, 2/3, of which a tenth of 2/3 is near."""
    values = [1.0, 0.05, -0.05, 0.07, -0.07, 0.61, 0.72, 0.74, -0.61, -0.72, 0.33, -1.0]
    nearest = [3, 2, 1, 2, 1, 2, 3, 3, 1, 0, 2, 0]
    other = [3, 1, 2, 2, 1, 3, 2, 3, 0, 1, 2, 0]
    quantizer = Uniform(2, 16)
    found = quantize_other_way(quantizer, column(values), 0.1)
    assert np.asarray(quantize_matrices(quantizer, column(values)).codes).reshape(-1).tolist() == (
        nearest
    )
    assert np.asarray(found).reshape(-1).tolist() == other


@pytest.mark.parametrize(
    "quantizer",
    [
        NormalFloat(4, 16),
        NormalFloat(1, 16),
        SymmetricNormalFloat(3, 16, "float32"),
        Uniform(3, 16, blocks_along="row"),
    ],
    ids=str,
)
def test_the_other_code_is_a_neighbour_exactly_where_a_border_is_near(quantizer):
    """Against the distances to all levels, in NumPy."""
    matrices = np.random.default_rng(0).normal(size=(2, 40, 3)).astype(np.float32)
    matrices[0, :16, 1] = 0
    quantized = quantize_matrices(quantizer, jnp.asarray(matrices))
    other = quantize_other_way(quantizer, jnp.asarray(matrices), MARGIN)
    nearest_value = np.asarray(dequantize(quantized))
    other_value = np.asarray(dequantize(quantized.replace(codes=other)))
    away, near = np.abs(matrices - other_value), np.abs(matrices - nearest_value)
    gap = np.abs(other_value - nearest_value)
    moved = np.asarray(other) != np.asarray(quantized.codes)
    step = np.asarray(other).astype(int) - np.asarray(quantized.codes)
    assert set(np.unique(step)) <= {-1, 0, 1}
    # What is within the margin of the middle of the two: (away - near) / 2 is the distance to it.
    assert moved.any()
    assert (away[moved] - near[moved] <= 2 * MARGIN * gap[moved] + 1e-6).all()
    assert (away[moved] >= near[moved] - 1e-6).all()
    if quantizer.mixes_columns:
        return
    levels = np.asarray(quantizer.levels)
    scales = np.repeat(np.asarray(quantized.scales, np.float32), 16, axis=1)[:, :40]
    relative = matrices / np.where(scales == 0, 1, scales)
    code = np.abs(relative[..., None] - levels).argmin(axis=-1)
    beside = code + np.sign(relative - levels[code]).astype(int)
    inside = (beside >= 0) & (beside < len(levels))
    gap = np.abs(levels[beside.clip(0, len(levels) - 1)] - levels[code])
    past = np.abs(relative - levels[code]) - (0.5 - MARGIN) * gap
    sure = np.abs(past) > 1e-5
    np.testing.assert_array_equal(moved[sure], ((past > 0) & inside & (scales != 0))[sure])
    assert not moved[0, :16, 1].any(), "a block of zeros has no borders"


def test_no_margin_moves_nothing_and_half_of_a_cell_is_too_much():
    matrices = jnp.asarray(np.random.default_rng(1).normal(size=(1, 64, 5)), jnp.float32)
    quantizer = NormalFloat(4, 16)
    np.testing.assert_array_equal(
        quantize_other_way(quantizer, matrices, 0.0), quantize_matrices(quantizer, matrices).codes
    )
    with pytest.raises(ConfigError, match=r"tracing_margin = 0\.5: allowed"):
        resolve({"tracing_margin": 0.5})


def test_bits_are_coins_of_their_own_for_each_client_and_site(model):
    sites = [site for site in model.sites if site.quantized]
    bits = np.stack(
        [
            np.concatenate([np.ravel(rounding_bits(leak_tracing_key(KEY, k), s)) for s in sites])
            for k in range(40)
        ]
    )
    assert bits.dtype == bool
    assert bits.shape[1] == sum(site.fan_in * site.columns for site in sites)
    assert abs(bits.mean() - 0.5) < 4 * 0.5 / np.sqrt(bits.size)
    signs = 2.0 * bits - 1
    products = signs @ signs.T / bits.shape[1]
    off = products[~np.eye(40, dtype=bool)]
    assert np.abs(off).max() < 6 / np.sqrt(bits.shape[1])


def sent_to(state, client, algorithm, model):
    """What a client of a state's next round is sent: not dequantized, and dequantized before."""
    whole = whole_proxy(state.params, model.sites)
    prepared = algorithm.transform.prepare(state.transform_state, whole)
    key = leak_tracing_key(state.secret_key, client)
    mask_key = jax.random.fold_in(KEY, client)

    def choose(proxy):
        return round_by_key(algorithm.transform.apply(mask_key, state.transform_state, proxy), key)

    return choose(prepared), choose(dequantize_proxy(prepared))


def test_what_travels_is_what_the_simulation_computes_with(model):
    """Choosing among codes and dequantizing then gives the values that are chosen among values."""
    state = fast(federate(model, TRACED).init)(KEY, model.params)
    seen = []
    for client in range(3):
        codes, values = sent_to(state, client, TRACED, model)
        assert not codes.other_rounding, "the other sides stay on the server"
        decoded = decode_proxy(encode_proxy(codes), Layout.of(codes))
        mine = dequantize_proxy(decoded).params
        jax.tree.map(np.testing.assert_array_equal, mine, values.params)
        seen.append(np.asarray(leaves_by_path(decoded.params)["hidden_0/kernel/codes"]))
    assert (seen[0] != seen[1]).any()


def test_a_client_trains_what_it_was_sent(model, data):
    """A round of one client adds what that client makes of the payload that it was sent."""
    federation = federate(model, TRACED, cohort=1)
    state = fast(federation.init)(KEY, model.params)
    state = state.replace(round=jnp.int32(2))
    after, _ = fast(federation.round)(state, data)
    client = federation.cohort(state)[0]
    mask_key = client_round_key(state.secret_key, state.round, client)
    whole = whole_proxy(state.params, model.sites)
    prepared = TRACED.transform.prepare(state.transform_state, whole)
    proxy = round_by_key(
        TRACED.transform.apply(mask_key, state.transform_state, prepared),
        leak_tracing_key(state.secret_key, client),
    )
    received = dequantize_proxy(decode_proxy(encode_proxy(proxy), Layout.of(proxy)))
    update = make_client_update(
        model.apply_fn, classification(), unscheduled(optax.sgd(0.2)), 4, epochs=2
    )
    key = jax.random.fold_in(jax.random.fold_in(state.public_key, state.round), client)
    delta = fast(update.train)(key, received, data, client).delta
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(delta)) > 1e-3
    jax.tree.map(
        lambda old, change, new: np.testing.assert_allclose(old + change, new, atol=1e-6),
        state.params,
        delta,
        after.params,
    )


def test_nothing_is_prepared_without_a_margin(model):
    prepared = quantize(NormalFloat(4, 4)).prepare((), whole_proxy(model.params, model.sites))
    assert prepared.other_rounding == {}
    assert prepared.traced == frozenset()
    assert round_by_key(prepared, None) is prepared
    chained = chain(identity(), quantize(NormalFloat(4, 4), 0.1))
    traced = chained.prepare(((), ()), whole_proxy(model.params, model.sites))
    assert traced.traced == {site.path for site in model.sites if site.quantized}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"server": {"rule": "from_sent"}}, "server.rule = 'from_sent'"),
        ({"algorithm": "fedlpp", "lora": {"rank": 2}}, "algorithm = 'fedlpp'"),
        ({"lora": {"rank": 2, "public_base": True}}, "lora.public_base = True"),
    ],
)
def test_what_own_roundings_do_not_go_with(values, told):
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")) as caught:
        resolve({"tracing_margin": 0.1, **values})
    assert "\n" not in str(caught.value)
