"""Several rounds a call: one program, no transfers, and what it says of the views."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds_cases import (
    KEY,
    TRANSFORM,
    double,
    octets,
)

from fedqsn_jax.core.keys import fold_in_name
from fedqsn_jax.protocol.proxy import effective_params, whole_proxy
from fedqsn_jax.rounds.calls import make_rounds


@pytest.fixture(scope="module")
def rounds(model, data, shared):
    """Calls of up to three rounds that may transfer nothing, the first state, and the program."""
    federation, init, _, _ = shared
    run = make_rounds(federation, rounds_per_call=3, evaluate_every=2)
    # What is compiled when does not depend on how well.
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)

    def call(state, stop, last=7):
        stop, last = jax.device_put((np.int32(stop), np.int32(last)))
        with jax.transfer_guard("disallow"):
            return run(state, data, data.examples, stop, last)

    yield call, lambda: init(KEY, model.params), run
    jax.config.update("jax_disable_most_optimizations", before)


def test_a_second_call_compiles_and_transfers_nothing(rounds):
    call, first, run = rounds
    compilations = []

    def listen(event, duration, **details):
        del duration, details
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state = first()
        state, _ = call(state, 3)
        assert run._cache_size() == 1
        compilations.clear()
        before = state
        state, _ = call(state, 6)
        state, _ = call(state, 7)
        assert compilations == []
        jnp.ones(7) @ jnp.ones((7, 3))
        assert compilations, "the listener does hear compilations"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert run._cache_size() == 1
    assert int(state.round) == 7
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params)), "donated"


def test_the_guard_does_hear_transfers(rounds, data):
    _, first, run = rounds
    state = first()
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed host-to-device"),
    ):
        run(state, data, data.examples, np.int32(3), np.int32(7))


def test_calls_may_be_cut_anywhere(rounds):
    """Rounds 1 to 3 and on in one call or in two: the same states, facts and metrics."""
    call, first, _ = rounds
    state, together = call(first(), 3)
    whole = octets(state)
    state, early = call(first(), 1)
    assert int(state.round) == 1
    state, late = call(state, 3)
    assert octets(state) == whole
    np.testing.assert_array_equal(together.evaluated, [False, True, False])
    np.testing.assert_array_equal(early.evaluated, [False, False, False])
    np.testing.assert_array_equal(late.evaluated, [True, False, False])
    for one, other in ((early.facts, late.facts), (early.metrics, late.metrics)):
        values = together.facts if "train/loss" in one else together.metrics
        for name, expected in values.items():
            joined = np.concatenate([np.asarray(one[name])[:1], np.asarray(other[name])[:2]])
            np.testing.assert_array_equal(joined, expected)
            np.testing.assert_array_equal(np.asarray(one[name])[1:], 0)
    state, last = call(state, 5, last=5)
    np.testing.assert_array_equal(last.evaluated, [True, True, False])


def test_rounds_are_rounds(rounds, data, model, shared):
    """A call of several rounds is that many single rounds and evaluations."""
    (call, first, _), (_, _, step, evaluate) = rounds, shared
    after, result = call(first(), 3)
    state = first()
    for index in range(3):
        state, facts = step(state, data)
        for name, value in facts.items():
            np.testing.assert_allclose(result.facts[name][index], value, rtol=1e-5)
        if index == 1:
            metrics = evaluate(state, data.examples)
            for name, value in metrics.items():
                np.testing.assert_allclose(result.metrics[name][1], value, rtol=1e-4, atol=1e-6)
            check_views(metrics, state, model, data)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        after.params,
        state.params,
    )


def check_views(metrics, state, model, data):
    """Each view's loss and accuracy, from its parameters as they are defined."""

    def evaluate(params):
        logits = double(model.apply_fn(params, data.examples, None))
        labels = np.asarray(data.examples["label"])
        chosen = logits[np.arange(len(labels)), labels]
        losses = np.log(np.exp(logits).sum(axis=1)) - chosen
        return losses.mean(), (logits.argmax(axis=1) == labels).mean()

    whole = whole_proxy(state.params, model.sites)
    prepared = TRANSFORM.prepare(state.transform_state, whole)
    server = dict(state.params)
    for path, seen in prepared.visible.items():
        layer = path.partition("/")[0]
        factor = np.asarray(seen) / np.float32(0.7)
        server[layer] = {
            "kernel": state.params[layer]["kernel"] * factor,
            "bias": state.params[layer]["bias"] * factor[0],
        }
    views = {"global": state.params, "server": server}
    for name, attacker in state.attackers.items():
        copy = dict(attacker.copy)
        for path, known in attacker.known.items():
            layer = path.partition("/")[0]
            share = np.float32(max(np.asarray(known).mean(), 1e-9))
            scale = 1 / share if np.asarray(known).any() else np.float32(1)
            copy[layer] = jax.tree.map(lambda leaf, s=scale: leaf * s, copy[layer])
        views[name] = copy
    for name, params in views.items():
        loss, accuracy = evaluate(params)
        np.testing.assert_allclose(metrics[f"{name}/loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(metrics[f"{name}/accuracy"], accuracy, rtol=1e-5)
    key = fold_in_name(jax.random.fold_in(state.secret_key, state.round), "proxy_view")
    samples = [
        evaluate(effective_params(TRANSFORM.apply(key, state.transform_state, prepared)))
        for key in jax.random.split(key, 3)
    ]
    losses, accuracies = np.transpose(samples)
    np.testing.assert_allclose(metrics["proxy/loss"], losses.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["proxy/accuracy"], accuracies.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["proxy/accuracy_std"], accuracies.std(), atol=1e-6)
