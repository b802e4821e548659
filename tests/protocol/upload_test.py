"""Quantized updates, what clients keep of them, and how they travel."""

import jax
import numpy as np
import pytest
from rounds_cases import FEDQSN, KEY, POPULATION, TRANSFORM, fast, federate, simulated_proxies

from fedqsn_jax.config.schema import ConfigError, resolve, with_fields
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import dequantize_params, whole_proxy
from fedqsn_jax.protocol.quantization import NormalFloat, Uniform
from fedqsn_jax.protocol.sizes import measure_traffic
from fedqsn_jax.protocol.upload import quantize_delta, quantized_upload
from fedqsn_jax.protocol.wire import decode_update, encode_update
from fedqsn_jax.rounds.participation import Participation
from fedqsn_jax.simulation import round_memory
from fedqsn_jax.simulation.compose import make_simulation

QUANTIZER = Uniform(2, 4, "float32")


def uniform_by_hand(column):
    """Two bits: each block of four to the nearest of -1, -1/3, 1/3, 1 times its maximum."""
    result = np.zeros_like(column)
    for start in range(0, len(column), 4):
        block = column[start : start + 4]
        scale = np.abs(block).max()
        if scale:
            levels = scale * np.array([-1, -1 / 3, 1 / 3, 1], np.float32)
            nearest = np.abs(block[:, None] - levels).argmin(axis=1)
            result[start : start + 4] = levels[nearest]
    return result


def test_what_is_lost_is_sent_later(model):
    """Against one column at a time in NumPy, over rounds that see different columns."""
    upload = quantized_upload(QUANTIZER, model.sites, feedback=True)
    send, rng = fast(upload.send), np.random.default_rng(0)
    residuals = {path: each[0] for path, each in upload.init(model.params, 3).items()}
    kept = {path: np.zeros(each.shape[1:], np.float32) for path, each in residuals.items()}
    assert {path: each.shape for path, each in residuals.items()} == {
        "hidden_0/kernel": (1, 6, 10),
        "hidden_1/kernel": (1, 10, 8),
    }
    for _ in range(3):
        visible = {"hidden_0/kernel": rng.random((1, 10)) < 0.6}
        delta = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), model.params)
        hidden = ~visible["hidden_0/kernel"][0]
        delta["hidden_0"]["kernel"][:, hidden] = 0
        sent, residuals = send(delta, residuals, visible)
        for path, before in kept.items():
            layer = path.partition("/")[0]
            seen = visible.get(path, np.ones((1, before.shape[1]), bool))[0]
            for column in range(before.shape[1]):
                wanted = delta[layer]["kernel"][:, column] + before[:, column]
                expected = uniform_by_hand(wanted) if seen[column] else 0 * wanted
                np.testing.assert_allclose(
                    sent[layer]["kernel"][:, column], expected, rtol=1e-5, atol=1e-6
                )
                if seen[column]:
                    before[:, column] = wanted - expected
            np.testing.assert_allclose(residuals[path][0], before, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(sent[layer]["bias"], delta[layer]["bias"])
        np.testing.assert_array_equal(sent["head"]["kernel"], delta["head"]["kernel"])


@pytest.mark.parametrize("quantizer", [NormalFloat(3, 4), QUANTIZER], ids=["normal", "uniform"])
def test_what_travels_is_what_is_simulated(model, quantizer):
    """Its bytes too are those that are reported, far fewer than in float32."""
    state = fast(federate(model, FEDQSN).init)(KEY, model.params)
    proxies, _ = simulated_proxies(TRANSFORM, model, state)
    proxy = proxies[0]
    rng = np.random.default_rng(1)
    delta = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), model.params)
    for path, seen in proxy.visible.items():
        layer = path.partition("/")[0]
        delta[layer]["kernel"][:, ~seen[0]] = 0
        delta[layer]["bias"][~seen[0]] = 0
    sent, _ = fast(quantized_upload(quantizer, model.sites).send)(delta, {}, proxy.visible)
    layout = Layout.of(proxy, upload=quantizer)
    payload = encode_update(quantize_delta(sent, quantizer, model.sites), proxy.visible, layout)
    decoded, visible = decode_update(payload, layout)
    jax.tree.map(np.testing.assert_array_equal, visible, proxy.visible)
    values = dequantize_params(decoded, model.sites)
    jax.tree.map(np.testing.assert_array_equal, values, sent)
    counts = {path: int(seen.sum()) for path, seen in proxy.visible.items()}
    plain, packed = (
        measure_traffic(TRANSFORM, model.params, model.sites, upload=upload).up.of(counts)
        for upload in (None, quantizer)
    )
    assert len(payload) == packed < 0.7 * plain
    with pytest.raises(ValueError, match=r"^update: shape of 'hidden_0/kernel' is"):
        encode_update(sent, proxy.visible, layout)
    with pytest.raises(ValueError, match="another model structure"):
        decode_update(payload, Layout.of(proxy))


def test_residuals_belong_to_the_clients_that_returned(model, data):
    """Those of clients that dropped out, or whose update was rejected, keep every byte."""
    upload = quantized_upload(NormalFloat(2, 4), model.sites, feedback=True)
    faults = Participation(dropout=0.3, nan=0.4)
    federation = federate(model, FEDQSN, cohort=POPULATION, participation=faults, upload=upload)
    state, run = fast(federation.init)(KEY, model.params), fast(federation.round)
    changes = []
    for _ in range(3):
        before = jax.device_get(state.residuals)
        state, facts = run(state, data)
        after = jax.device_get(state.residuals)
        changed = np.any(
            [(after[path] != before[path]).any(axis=(1, 2, 3)) for path in after], axis=0
        )
        assert changed.sum() == facts["clients/returned"] - facts["clients/rejected"]
        assert np.isfinite(jax.tree.leaves(after)[0]).all()
        changes.append(changed)
    assert 0 < np.sum(changes) < 3 * POPULATION
    assert not np.any(changes, axis=0)[1], "client 1 has no rows"
    whole = whole_proxy(model.params, model.sites)
    server_visible = TRANSFORM.prepare(state.transform_state, whole).visible
    for path, seen in server_visible.items():
        assert not after[path][..., ~np.asarray(seen)[0]].any(), "the server hides these"


def test_feedback_that_cannot_be_is_refused(model, data, monkeypatch):
    with pytest.raises(ConfigError, match=r"^upload\.error_feedback = True with upload\.bits = 0:"):
        resolve({"upload": {"error_feedback": True}})
    with pytest.raises(ConfigError, match=r"^upload\.error_feedback = 1: allowed is a value"):
        resolve({"upload": {"error_feedback": 1}})
    config = resolve(
        {
            "upload": {"bits": 4, "error_feedback": True},
            "cohort": {"size": 4},
            "evaluation": {"attackers": (1,)},
        }
    )
    made = make_simulation(config, model.apply_fn, classification(), model.params, data)
    kernels = 4 * (6 * 10 + 10 * 8)
    assert made.memory["residuals of all clients"] == POPULATION * kernels
    assert made.memory["residuals of the cohort"] == 4 * kernels
    # Of adapters of rank 2, of which both tensors are quantized; or none is.
    adapted = with_fields(config, {"lora.rank": 2, "lora.quantize": True})
    made = make_simulation(adapted, model.apply_fn, classification(), model.params, data)
    kernels = 4 * 2 * (6 + 10 + 10 + 8)
    assert made.memory["residuals of all clients"] == POPULATION * kernels
    for values in ({"lora.quantize": False}, {"client.trained": ("head",)}):
        useless = with_fields(adapted, values)
        with pytest.raises(ConfigError, match=r"^upload\.bits = 4: no kernel of a site is trained"):
            make_simulation(useless, model.apply_fn, classification(), model.params, data)
    monkeypatch.setattr(round_memory, "device_bytes", lambda: 6000)
    with pytest.raises(
        ConfigError, match=r"^upload\.error_feedback = True: residuals of 8 clients"
    ):
        make_simulation(config, model.apply_fn, classification(), model.params, data)
