"""Views one after the other are those that are evaluated in one jitted call."""

import jax
import jax.numpy as jnp
import pytest

from fedqsn_jax.generation.text_evaluation import TextEvaluation
from fedqsn_jax.generation.text_views import evaluate_text_views, view_params
from fedqsn_jax.protocol.proxy import (
    chain,
    client_mask,
    dequantize_proxy,
    effective_params,
    quantize,
    server_mask,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.rounds.views import (
    Views,
    evaluate_views,
    make_attacker,
    received_columns,
    update_attacker,
)


def test_views_are_those_of_the_rounds(model):
    params, sites = model.params, model.sites
    transform = chain(quantize(NormalFloat(4, 8)), server_mask(0.3), client_mask(0.4))

    @jax.jit
    def begin(params):
        whole = whole_proxy(params, sites)
        state = transform.init(jax.random.key(0), whole)
        prepared = dequantize_proxy(transform.prepare(state, whole))
        attacker = make_attacker(jax.random.key(1), 1, 1, params, sites)
        proxy = transform.apply(jax.random.key(2), state, prepared)
        visible = {path: seen[None] for path, seen in proxy.visible.items()}
        received = received_columns(attacker, jnp.zeros(1, jnp.int32), visible)
        return state, prepared, update_attacker(attacker, received, prepared, sites)

    state, prepared, attacker = begin(params)
    attackers = {"attacker_1": attacker}

    def apply(key, prepared):
        return transform.apply(key, state, prepared)

    keys = jax.random.split(jax.random.key(3), 4)
    batch = {"x": jnp.linspace(-1, 1, 30).reshape(5, 6)}

    @jax.jit
    def score(params):
        return {"spread": model.apply_fn(params, batch, None).std()}

    def evaluator(params, rows):
        del rows
        return score(params)

    together = jax.jit(
        lambda: evaluate_views(
            evaluator,
            batch,
            Views(
                params=params,
                sendable=params,
                prepared=prepared,
                apply=apply,
                proxy_keys=keys,
                attackers=attackers,
            ),
            "spread",
        )
    )()

    def evaluate(params):
        value = float(score(params)["spread"])
        return TextEvaluation({"spread": value}, [f"{value:.6f}"])

    views = evaluate_text_views(evaluate, view_params(params, prepared, apply, keys, attackers))
    assert set(views.metrics) == set(together)
    for name, value in together.items():
        assert views.metrics[name] == pytest.approx(float(value), rel=1e-5)
    assert len(set(views.metrics.values())) == 5
    assert set(views.texts) == {"global", "server", "proxy", "attacker_1"}
    first = float(score(effective_params(jax.jit(apply)(keys[0], prepared)))["spread"])
    assert float(views.texts["proxy"][0]) == pytest.approx(first, abs=1e-5)
