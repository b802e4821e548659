"""Whole rounds that train adapters: under masks, and FedLPP's on a public base."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import Model
from rounds_cases import (
    FEDQSN,
    KEY,
    POPULATION,
    TRANSFORM,
    cohort_of,
    double,
    fast,
    federate,
    octets,
)

from fedqsn_jax.config.schema import ServerConfig
from fedqsn_jax.core.trees import exclude, leaves_by_path, select, select_trained
from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.protocol.algorithms import fedlpp
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.lora import find_adapters
from fedqsn_jax.protocol.masks import hide
from fedqsn_jax.protocol.proxy import dequantize_params, whole_proxy
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.sizes import measure_traffic
from fedqsn_jax.protocol.upload import quantize_delta, quantized_upload
from fedqsn_jax.protocol.wire import decode_proxy, decode_update, encode_proxy, encode_update
from fedqsn_jax.rounds.aggregation import Contribution, make_aggregator
from fedqsn_jax.rounds.participation import Participation
from fedqsn_jax.rounds.views import attacker_params
from fedqsn_jax.simulation.from_config import server_optimizer

RANK = 3
NAMES = ("hidden_0", "hidden_1")
NF2 = NormalFloat(2, 4)


@pytest.fixture(scope="module")
def adapted(model):
    """The tests' model with adapters that have been trained before, and a factor of 2."""
    lora = find_adapters(model.params, (), (), RANK, 2.0 * RANK)
    params = lora.add(KEY, model.params)
    rng = np.random.default_rng(3)
    for name in NAMES:
        shape = params[name]["kernel_lora_b"].shape
        params[name]["kernel_lora_b"] = jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32)
    make_sites = functools.partial(lora.sites, model.sites)
    return lora.adapt(model.apply_fn), params, make_sites


@pytest.fixture(scope="module")
def trained(adapted):
    return select_trained(adapted[1], ("lora",))


def test_a_run_with_adapters_does_not_depend_on_hidden_values(adapted, trained, data, set_hidden):
    """Change them, in W and B, even to NaN: they stay, and nothing else changes a byte.

    With every option that changes what is done with updates; without, `contract_test` has it.
    """
    apply_fn, params, make_sites = adapted
    model = Model(apply_fn, params, make_sites(quantize=True, public=False))
    server = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
    options = {
        "proximal": 0.3,
        "normalize": "coverage",
        "rule": "interpolate",
        "clip_norm": 0.05,
        "participation": Participation(dropout=0.3, stragglers=0.5, nan=0.3),
        "upload": quantized_upload(NF2, model.sites, feedback=True, trained=trained),
    }
    federation = federate(model, FEDQSN, trained=trained, server=server, attackers=(4,), **options)
    init, run = map(fast, (federation.init, federation.round))
    visible = TRANSFORM.prepare(
        init(KEY, params).transform_state, whole_proxy(params, model.sites)
    ).visible
    assert set(visible) == {"hidden_0/kernel", "hidden_1/kernel"}
    results = []
    for value in (np.nan, -2.0):
        start = set_hidden(params, model.sites, visible, value)
        state, facts = init(KEY, start), []
        for _ in range(2):
            state, round_facts = run(state, data)
            facts.append(round_facts)
        for path, leaf in leaves_by_path(start).items():
            before, after = np.asarray(leaf), np.asarray(leaves_by_path(state.params)[path])
            if path not in trained:
                assert after.tobytes() == before.tobytes()
                continue
            seen = np.ones(leaf.shape, bool)
            if path.endswith("_b"):
                seen &= np.asarray(visible[path.removesuffix("_lora_b")])
                assert not seen.all()
            assert after[~seen].tobytes() == before[~seen].tobytes()
            assert (after[seen] != before[seen]).any()
            assert np.isfinite(after[seen]).all()
        state = state.replace(params=set_hidden(state.params, model.sites, visible, 0.0))
        results.append(octets((state, facts)))
    assert results[0] == results[1]

    # Clients keep what was lost of A, and of the columns of B that they may see.
    assert set(state.residuals) == trained
    for path, kept in state.residuals.items():
        assert np.asarray(kept).any()
        if path.endswith("_b"):
            seen = np.asarray(visible[path.removesuffix("_lora_b")])[0]
            assert not np.asarray(kept)[..., ~seen].any()

    # Colluders have those columns of B that they have of W, which is frozen and stored once.
    attacker = state.attackers["attacker_4"]
    assert set(attacker.known) == set(visible)
    assert set(leaves_by_path(attacker.copy)) == trained
    prepared = jax.jit(federation.prepare)(state).params
    scaled = attacker_params(attacker, model.sites, prepared)
    for name in NAMES:
        known = np.asarray(attacker.known[f"{name}/kernel"])[0]
        held = {**attacker.copy[name], "kernel": prepared[name]["kernel"]}
        for tensor in ("kernel", "kernel_lora_b"):
            expected = np.where(known, held[tensor], 0) * known.size / known.sum()
            np.testing.assert_allclose(scaled[name][tensor], expected, rtol=1e-6)
            assert np.asarray(scaled[name][tensor])[:, known].any()


@pytest.mark.parametrize("quantize", [False, True])
def test_what_returns_of_adapters_is_what_is_simulated(adapted, trained, quantize):
    """Quantized where they are on the way down; and only updates say how updates travel."""
    _, params, make_sites = adapted
    sites, quantizer = make_sites(quantize=quantize, public=False), NormalFloat(3, 4)

    @fast
    def receive(params):
        whole = whole_proxy(params, sites)
        state = TRANSFORM.init(KEY, whole)
        return TRANSFORM.apply(KEY, state, TRANSFORM.prepare(state, whole))

    proxy = receive(params)
    delta = select(hide(params, sites, proxy.visible), trained)
    upload = quantized_upload(quantizer, sites, feedback=True, trained=trained)
    residuals = {path: each[0] for path, each in upload.init(params, 2).items()}
    assert set(residuals) == (trained if quantize else set())
    sent, kept = fast(upload.send)(delta, residuals, proxy.visible)
    for path, leaf in leaves_by_path(sent).items():
        lost = np.asarray(leaves_by_path(delta)[path]) - np.asarray(leaf)
        assert lost.any() == quantize
        if quantize:
            np.testing.assert_allclose(kept[path][0], lost, atol=1e-6)

    layout = Layout.of(proxy, trained=trained, upload=quantizer)
    payload = encode_update(quantize_delta(sent, quantizer, sites), proxy.visible, layout)
    returned, visible = decode_update(payload, layout)
    assert octets(visible) == octets(proxy.visible)
    assert octets(dequantize_params(returned, sites)) == octets(sent)
    counts = {path: int(np.asarray(seen).sum()) for path, seen in proxy.visible.items()}
    both = [
        measure_traffic(TRANSFORM, params, sites, trained=trained, upload=each)
        for each in (None, quantizer)
    ]
    assert len(payload) == both[1].up.of(counts)
    assert (both[1].up.of(counts) < both[0].up.of(counts)) == quantize
    assert both[1].down == both[0].down
    assert octets(decode_proxy(encode_proxy(proxy), layout)) == octets(proxy)
    with pytest.raises(ValueError, match="another model structure"):
        decode_update(payload, Layout.of(proxy, trained=trained))


@pytest.mark.parametrize("quantize", [False, True])
def test_what_is_sent_of_adapters_is_what_is_simulated(adapted, quantize, set_hidden):
    """To the byte, in the expected length; and a client's hidden columns leave no trace."""
    _, params, make_sites = adapted
    sites = make_sites(quantize=quantize, public=False)

    @fast
    def receive(params):
        whole = whole_proxy(params, sites)
        state = TRANSFORM.init(KEY, whole)
        return TRANSFORM.apply(KEY, state, TRANSFORM.prepare(state, whole))

    proxy = receive(params)
    payload = encode_proxy(proxy)
    counts = {path: int(np.asarray(seen).sum()) for path, seen in proxy.visible.items()}
    assert len(payload) == measure_traffic(TRANSFORM, params, sites).down.of(counts)
    decoded = decode_proxy(payload, Layout.of(proxy))
    assert octets(decoded) == octets(proxy)
    assert jax.tree.structure(decoded) == jax.tree.structure(proxy)
    changed = set_hidden(params, sites, proxy.visible, np.nan)
    assert encode_proxy(receive(changed)) == payload


# FedLPP.


def numpy_normal_float(values, quantizer):
    """Nearest level times the scale of its block; blocks run through the flattened tensor."""
    flat = np.asarray(values, np.float32).reshape(-1)
    levels = np.asarray(quantizer.levels)
    out = np.zeros(flat.shape)
    for start in range(0, len(flat), quantizer.block_size):
        block = flat[start : start + quantizer.block_size]
        scale = float(np.abs(block).max().astype(ml_dtypes.bfloat16))
        if scale:
            nearest = np.abs(block[:, None] / scale - levels[None]).argmin(axis=1)
            out[start : start + len(block)] = levels[nearest] * scale
    return out.reshape(np.shape(values))


def numpy_fedlpp(loss_and_gradient, params, data, ids, rate, epochs, server_rate):
    """One round of full-batch SGD on A and B alone; the model computes with ``W + 2 A B``."""
    params = double(params)
    tensors = [(name, f"kernel_lora_{letter}") for name in NAMES for letter in "ab"]
    sent = {key: numpy_normal_float(params[key[0]][key[1]], NF2) for key in tensors}
    x, labels = np.asarray(data.examples["x"], np.float64), np.asarray(data.examples["label"])
    offsets = np.asarray(data.offsets)
    total, rows = dict.fromkeys(tensors, 0.0), 0
    for client in ids:
        mine = slice(offsets[client], offsets[client + 1])
        count = mine.stop - mine.start
        rows += count
        theta = dict(sent)
        for _ in range(epochs if count else 0):
            plain = {name: dict(layer) for name, layer in params.items()}
            for name in NAMES:
                product = theta[name, "kernel_lora_a"] @ theta[name, "kernel_lora_b"]
                plain[name] = {"kernel": params[name]["kernel"] + 2 * product}
                plain[name]["bias"] = params[name]["bias"]
            _, gradient = loss_and_gradient(plain, x[mine], labels[mine])
            for name in NAMES:
                a, b, g = (
                    theta[name, "kernel_lora_a"],
                    theta[name, "kernel_lora_b"],
                    gradient[name]["kernel"],
                )
                theta[name, "kernel_lora_a"] = a - rate * 2 * g @ b.T
                theta[name, "kernel_lora_b"] = b - rate * 2 * a.T @ g
        total = {key: total[key] + count * theta[key] for key in tensors}
    new = {}
    for key in tensors:
        move = server_rate * (total[key] / rows - sent[key])
        new["/".join(key)] = params[key[0]][key[1]] + move
    return new, sent


def test_fedlpp_is_numpys(adapted, trained, data, numpy_loss_and_gradient, tmp_path):
    """The server's adapters move by ``r (mean of returned - Q(sent))``."""
    apply_fn, params, make_sites = adapted
    algorithm = fedlpp(NF2)
    model = Model(apply_fn, params, make_sites(quantize=True, public=True, flat=True))
    federation = federate(
        model,
        algorithm,
        batch_size=16,
        attackers=(POPULATION,),
        trained=trained,
        sent=trained,
        server=optax.sgd(0.5),
    )
    state = federation.init(KEY, params)
    assert set(leaves_by_path(state.attackers[f"attacker_{POPULATION}"].copy)) == trained
    ids = cohort_of(state)
    after, facts = fast(federation.round)(state, data)
    assert set(facts) == {"train/loss", "clients/returned", "clients/rejected"}
    expected, sent = numpy_fedlpp(numpy_loss_and_gradient, params, data, ids, 0.2, 2, 0.5)
    for path, leaf in leaves_by_path(after.params).items():
        if path in trained:
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5)
        else:
            assert octets(leaf) == octets(leaves_by_path(params)[path])
    # What travels is the quantized adapters, and what colluders have is that.
    whole = whole_proxy(select(params, trained), model.sites)
    prepared = fast(algorithm.transform.prepare)(state.transform_state, whole)
    payload = encode_proxy(prepared)
    entries = {path: leaf.size for path, leaf in leaves_by_path(select(params, trained)).items()}
    codes = sum(-(-2 * size // 8) for size in entries.values())
    scales = sum(2 * -(-size // 4) for size in entries.values())
    assert len(payload) == 48 + codes + scales
    layout = Layout.of(prepared, trained=trained)
    assert octets(decode_proxy(payload, layout)) == octets(prepared)
    traffic = measure_traffic(
        algorithm.transform, params, model.sites, sent=trained, trained=trained
    )
    assert traffic.down.of({}) == len(payload)
    assert traffic.up.of({}) == 48 + 4 * sum(entries.values())
    copy = leaves_by_path(after.attackers[f"attacker_{POPULATION}"].copy)
    for (name, tensor), values in sent.items():
        np.testing.assert_allclose(copy[f"{name}/{tensor}"], values, rtol=1e-5, atol=1e-7)
    assert not set(leaves_by_path(exclude(params, trained))) & set(copy)
    # A state with gaps is saved and restored as any other.
    with Checkpoints(tmp_path / "saved", keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, after, [], score=0.0)
        restored, _ = checkpoints.restore(jax.eval_shape(federation.init, KEY, params))
    assert jax.tree.structure(restored) == jax.tree.structure(after)
    assert octets(restored) == octets(after)


@pytest.mark.parametrize("rule", ["delta", "from_sent", "interpolate"])
def test_rules_by_hand(rule, model):
    """Where the server moves to, with hidden columns and ones that nobody saw left as they are."""
    aggregator = make_aggregator(model.sites, optax.sgd(0.5), rule=rule)
    rng = np.random.default_rng(5)
    sent, deltas = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)
        for tree in (model.params, model.params)
    )
    server = {"hidden_0/kernel": jnp.arange(10)[None] != 3}
    seen = jnp.stack([jnp.arange(10)[None] > 4, jnp.arange(10)[None] > 5])
    visible = {"hidden_0/kernel": seen & server["hidden_0/kernel"][None]}
    finish = fast(aggregator.finish)
    coverage = {path: each[0] + 3.0 * each[1] for path, each in visible.items()}
    total = Contribution(deltas, jnp.float32(4), coverage, jnp.uint32(0))
    params, _ = finish(model.params, aggregator.init(model.params), total, server, sent)
    for path, leaf in leaves_by_path(params).items():
        before, q, d = (leaves_by_path(tree)[path] for tree in (model.params, sent, deltas))
        expected = {
            "delta": before + 0.5 * d / 4,
            "from_sent": q + 0.5 * d / 4,
            "interpolate": 0.5 * before + 0.5 * (q + d / 4),
        }[rule]
        if path.startswith("hidden_0"):
            expected = np.where(
                (np.arange(10) > 4).reshape((1,) * (leaf.ndim - 1) + (10,)), expected, before
            )
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


def test_the_authors_fourth_rule_lets_the_rate_fall_over_the_rounds():
    optimizer = server_optimizer(ServerConfig(learning_rate=0.5, decay="linear"), rounds=4)
    state, steps = optimizer.init(jnp.zeros(())), []
    for _ in range(5):
        step, state = optimizer.update(jnp.float32(-1), state)
        steps.append(float(step))
    np.testing.assert_allclose(steps, [0.5, 0.375, 0.25, 0.125, 0.0])
