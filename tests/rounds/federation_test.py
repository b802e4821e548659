"""Whole rounds: the invariants as a run meets them."""

import jax
import numpy as np
import pytest
from rounds_cases import (
    FEDQSN,
    KEY,
    POPULATION,
    TRANSFORM,
    double,
    fast,
    federate,
    octets,
    simulated_proxies,
)

from fedqsn_jax.core.keys import client_round_key
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.protocol.algorithms import Algorithm, fedavg, fedqsn, fedsn
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.wire import decode_proxy, encode_proxy
from fedqsn_jax.rounds.views import attacker_params

# Invariant 1.


def test_without_masks_and_quantizer_it_is_fedavg_bit_for_bit(model, data):
    """Probability zero leaves no operation behind: state and program are FedAvg's own."""

    def init_and_program(algorithm):
        federation = federate(model, algorithm)
        state = federation.init(KEY, model.params)
        return octets(state), str(jax.make_jaxpr(federation.round)(state, data))

    expected = init_and_program(fedavg())
    nothing = Algorithm("fedqsn", None, 0.0, 0.0, "fixed_count")
    assert init_and_program(nothing) == expected
    assert init_and_program(fedsn(0.0, 0.0)) == expected


def numpy_round(loss_and_gradient, params, proxies, data, rate, epochs):
    """One round of full-batch SGD by every client, on theta whose loss sees theta * factor.

    Args:
      loss_and_gradient: The model's.
      params: The server's parameters.
      proxies: For each client its values and their factors, zero where hidden.
      data: The clients' rows.
      rate: Learning rate.
      epochs: Steps, as the batch is whole.
    """
    x, labels = np.asarray(data.examples["x"], np.float64), np.asarray(data.examples["label"])
    offsets = np.asarray(data.offsets)
    total, losses = jax.tree.map(np.zeros_like, params), 0.0
    for client, (start, factors) in enumerate(proxies):
        rows = slice(offsets[client], offsets[client + 1])
        count = rows.stop - rows.start
        if count == 0:
            continue
        theta = start
        for _ in range(epochs):
            effective = jax.tree.map(np.multiply, theta, factors)
            loss, gradient = loss_and_gradient(effective, x[rows], labels[rows])
            theta = jax.tree.map(lambda t, g, f: t - rate * g * f, theta, gradient, factors)
            losses += loss * count / epochs
        total = jax.tree.map(lambda s, e, b, n=count: s + n * (e - b), total, theta, start)
    params = jax.tree.map(lambda p, t: p + t / offsets[-1], params, total)
    return params, losses / offsets[-1]


def test_fedavg_is_numpys(model, data, numpy_loss_and_gradient):
    """And colluders hold what was sent to them, which is the whole model."""
    federation = federate(model, fedavg(), cohort=POPULATION, batch_size=16, epochs=3)
    state, run = federation.init(KEY, model.params), fast(federation.round)
    expected = double(model.params)
    ones = jax.tree.map(np.ones_like, expected)
    for known in state.attackers["attacker_1"].known.values():
        assert not np.asarray(known).any()
    for _ in range(3):
        sent = octets(state.params)
        state, facts = run(state, data)
        expected, loss = numpy_round(
            numpy_loss_and_gradient, expected, [(expected, ones)] * POPULATION, data, 0.2, 3
        )
        np.testing.assert_allclose(facts["train/loss"], loss, rtol=1e-5)
        attacker = state.attackers["attacker_1"]
        assert octets(attacker.copy) == sent
        assert all(np.asarray(known).all() for known in attacker.known.values())
    values = attacker_params(attacker, model.sites)
    jax.tree.map(np.testing.assert_array_equal, values, attacker.copy)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, double(model.params))
    assert min(jax.tree.leaves(moved)) > 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), state.params, expected
    )


def test_fedqsn_is_numpys(model, data, numpy_loss_and_gradient):
    """With the masks that the clients' keys give, and the codes of the whole model."""
    federation = federate(model, FEDQSN, cohort=POPULATION, batch_size=16, epochs=3)
    state, run = federation.init(KEY, model.params), fast(federation.round)
    expected = double(model.params)
    for _ in range(2):
        simulated, server_visible = simulated_proxies(TRANSFORM, model, state)
        proxies = []
        for proxy in simulated:
            factors = jax.tree.map(np.ones_like, expected)
            for path, seen in proxy.visible.items():
                factor = np.asarray(seen)[0] / (0.7 * 0.6)
                layer = path.partition("/")[0]
                factors[layer] = {"kernel": factors[layer]["kernel"] * factor, "bias": factor}
            proxies.append((double(proxy.params), factors))
        before = state
        state, facts = run(state, data)
        expected, loss = numpy_round(
            numpy_loss_and_gradient, double(before.params), proxies, data, 0.2, 3
        )
        np.testing.assert_allclose(facts["train/loss"], loss, rtol=1e-5)
        for path, seen in server_visible.items():
            visible = sum(np.asarray(proxy.visible[path]).sum() for proxy in simulated)
            assert facts[f"visible/{path}"] == visible
            now, then = (leaves_by_path(s.params)[path] for s in (state, before))
            moved = (np.asarray(now) != np.asarray(then)).any(axis=0)
            assert not moved[~np.asarray(seen)[0]].any()
            assert moved.any()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            state.params,
            expected,
        )


# Invariants 2 and 3.


def test_a_run_does_not_depend_on_hidden_values(model, data, set_hidden, shared):
    """Change them, even to NaN: they stay, and nothing else that a round makes changes a byte."""
    _, init, run, evaluate = shared
    visible = TRANSFORM.prepare(
        init(KEY, model.params).transform_state, whole_proxy(model.params, model.sites)
    ).visible
    assert all(not np.asarray(seen).all() for seen in visible.values())
    results, views = [], []
    for value in (np.nan, -2.0):
        start = set_hidden(model.params, model.sites, visible, value)
        state, facts = init(KEY, start), []
        for _ in range(3):
            state, round_facts = run(state, data)
            facts.append(round_facts)
        for path, leaf in leaves_by_path(start).items():
            seen = np.asarray(visible.get(path.partition("/")[0] + "/kernel", True))
            seen = np.broadcast_to(seen, leaf.shape) if leaf.ndim == 2 else seen.reshape(-1)
            before, after = np.asarray(leaf), np.asarray(leaves_by_path(state.params)[path])
            hidden = np.broadcast_to(~seen, leaf.shape)
            assert after[hidden].tobytes() == before[hidden].tobytes()
            assert np.isfinite(after[~hidden]).all()
            assert (after[~hidden] != before[~hidden]).any()
        metrics = evaluate(state, data.examples)
        views.append([metrics.pop(f"global/{name}") for name in ("loss", "accuracy")])
        state = state.replace(params=set_hidden(state.params, model.sites, visible, 0.0))
        results.append(octets((state, facts, metrics)))
    assert results[0] == results[1]
    assert np.isnan(views[0][0])
    assert np.isfinite(views[1][0])


# Invariant 4.


@pytest.mark.parametrize(
    "algorithm",
    [fedqsn(NormalFloat(4, 4), 0.3, 0.4), fedsn(0.3, 0.4), fedqsn(NormalFloat(3, 64), 0.0, 0.95)],
    ids=["fedqsn", "fedsn", "nothing_visible"],
)
def test_what_is_sent_is_what_is_simulated(model, algorithm):
    """To the byte, also where a client sees no column of a site; zero may lose its sign."""
    transform = algorithm.transform
    state = fast(federate(model, algorithm).init)(KEY, model.params)
    whole = whole_proxy(model.params, model.sites)
    prepared = fast(transform.prepare)(state.transform_state, whole)
    simulated, _ = simulated_proxies(transform, model, state)
    apply = fast(transform.apply)
    nothing = False
    for client_id in range(POPULATION):
        key = client_round_key(state.secret_key, state.round, client_id)
        proxy = apply(key, state.transform_state, prepared)
        payload = encode_proxy(proxy)
        decoded = decode_proxy(payload, Layout.of(proxy))
        assert jax.tree.structure(decoded) == jax.tree.structure(proxy)
        assert octets(decoded) == octets(proxy)
        received = dequantize_proxy(decoded)
        jax.tree.map(np.testing.assert_array_equal, received, simulated[client_id])
        assert encode_proxy(decoded) == payload
        nothing |= any(not np.asarray(seen).any() for seen in proxy.visible.values())
    assert nothing == (algorithm.p2 > 0.9)
