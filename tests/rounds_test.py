"""Whole rounds: the invariants as a run meets them, and what colluding clients come to know."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.aggregation import make_aggregator
from fedqsn_jax.algorithms import Algorithm, fedavg, fedqsn, fedsn
from fedqsn_jax.client import make_client_update
from fedqsn_jax.client_optimizer import unscheduled
from fedqsn_jax.cohort import ClientAxis, sample_cohort
from fedqsn_jax.masking import leaves_by_path
from fedqsn_jax.metrics import make_evaluator
from fedqsn_jax.proxy import dequantize_proxy, effective_params, whole_proxy
from fedqsn_jax.quantization import NormalFloat
from fedqsn_jax.randomness import client_round_key, fold_in_name
from fedqsn_jax.rounds import make_federation, make_rounds
from fedqsn_jax.tasks import classification
from fedqsn_jax.views import attacker_params
from fedqsn_jax.wire import Layout, decode_proxy, encode_proxy

FAST = {"xla_backend_optimization_level": 0}
"""Most of these tests' time is compilation."""
KEY = jax.random.key(4)
POPULATION = 8
FEDQSN = fedqsn(NormalFloat(2, 4), 0.3, 0.4)
TRANSFORM = FEDQSN.transform


def federate(
    model,
    algorithm,
    *,
    cohort=4,
    chunk=1,
    server=None,
    client=None,
    attackers=(1, 4),
    batch_size=4,
    epochs=2,
):
    task = classification()
    update = make_client_update(
        model.apply_fn, task, unscheduled(client or optax.sgd(0.2)), batch_size, epochs=epochs
    )
    return make_federation(
        algorithm.transform,
        update,
        make_aggregator(model.sites, server or optax.sgd(1.0)),
        make_evaluator(model.apply_fn, task, 16),
        model.sites,
        population=POPULATION,
        cohort=cohort,
        client_axis=ClientAxis(chunk),
        proxy_samples=3,
        attackers=attackers,
        score=task.score,
    )


def octets(tree):
    return [
        np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ).tobytes()
        for leaf in jax.tree.leaves(tree)
    ]


def fast(function):
    return jax.jit(function, compiler_options=FAST)


def cohort_of(state, cohort=4):
    key = fold_in_name(jax.random.fold_in(state.public_key, state.round), "cohort")
    return np.asarray(sample_cohort(key, POPULATION, cohort))


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


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


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


@functools.cache
def simulator(transform, sites):
    def simulate(params, transform_state, secret_key, round_index, ids):
        prepared = dequantize_proxy(transform.prepare(transform_state, whole_proxy(params, sites)))

        def one(client_id):
            key = client_round_key(secret_key, round_index, client_id)
            return transform.apply(key, transform_state, prepared)

        return jax.vmap(one)(ids), prepared.visible

    return fast(simulate)


def simulated_proxies(transform, model, state):
    """What each client of the population gets in the state's round, and the server's mask."""
    stacked, visible = jax.device_get(
        simulator(transform, model.sites)(
            state.params,
            state.transform_state,
            state.secret_key,
            state.round,
            np.arange(POPULATION, dtype=np.int32),
        )
    )
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(POPULATION)]
    return each, visible


# Invariants 2 and 3.


@pytest.fixture(scope="module")
def shared(model):
    """One federation for several tests, with its functions compiled: Adam on both sides."""
    server = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
    client = optax.adamw(0.01, weight_decay=0.1)
    federation = federate(model, FEDQSN, server=server, client=client)
    return federation, fast(federation.init), fast(federation.round), fast(federation.evaluate)


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
    state = federate(model, algorithm).init(KEY, model.params)
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


# Invariant 8, and calls of several rounds.


@pytest.fixture(scope="module")
def rounds(model, data, shared):
    """Calls of up to three rounds that may transfer nothing, the first state, and the program."""
    federation, init, _, _ = shared
    run = make_rounds(federation, rounds_per_call=3, evaluate_every=2)
    # What is compiled when does not depend on how well.
    jax.config.update("jax_disable_most_optimizations", True)

    def call(state, stop, last=7):
        stop, last = jax.device_put((np.int32(stop), np.int32(last)))
        with jax.transfer_guard("disallow"):
            return run(state, data, data.examples, stop, last)

    yield call, lambda: init(KEY, model.params), run
    jax.config.update("jax_disable_most_optimizations", False)


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


# Attackers.


def test_attackers_know_what_they_have_received(model, data, shared):
    _, init, run, _ = shared
    state = init(KEY, model.params)
    members = {name: set(np.asarray(a.members).tolist()) for name, a in state.attackers.items()}
    assert members["attacker_1"] < members["attacker_4"]
    assert [len(ids) for ids in members.values()] == [1, 4]
    zeros = jax.tree.map(np.zeros_like, double(model.params))
    known = {
        name: {site.path: np.zeros((1, site.columns), bool) for site in model.sites}
        for name in members
    }
    copies = {name: jax.tree.map(np.array, zeros) for name in members}
    met = dict.fromkeys(members, 0)
    simulate = functools.partial(simulated_proxies, TRANSFORM, model)
    for _ in range(5):
        cohort, (proxies, server_visible) = cohort_of(state), simulate(state)
        for name, ids in members.items():
            for client_id in ids & set(cohort.tolist()):
                met[name] += 1
                values = proxies[client_id].params
                copies[name]["head"] = double(values["head"])
                for path, seen in proxies[client_id].visible.items():
                    known[name][path] |= seen
                    layer, now = path.partition("/")[0], seen[0]
                    copies[name][layer]["kernel"][:, now] = values[layer]["kernel"][:, now]
                    copies[name][layer]["bias"][now] = values[layer]["bias"][now]
        state, _ = run(state, data)
        for name, attacker in state.attackers.items():
            jax.tree.map(np.testing.assert_array_equal, attacker.known, known[name])
            jax.tree.map(np.testing.assert_array_equal, double(attacker.copy), copies[name])
        for path, seen in server_visible.items():
            one, four = (np.asarray(a.known[path]) for a in state.attackers.values())
            assert not (one & ~four).any()
            assert not (four & ~np.asarray(seen)).any()
    assert 0 < met["attacker_1"] < met["attacker_4"]
    assert any(
        (np.asarray(state.attackers["attacker_4"].known[path]) & ~known["attacker_1"][path]).any()
        for path in known["attacker_1"]
    ), "four clients know more than one"

    attacker = state.attackers["attacker_1"]
    values = attacker_params(attacker, model.sites)
    for site in model.sites:
        layer, known_columns = site.path.partition("/")[0], np.asarray(attacker.known[site.path])
        for leaf in ("kernel", "bias"):
            expected = np.asarray(attacker.copy[layer][leaf]) / known_columns.mean()
            np.testing.assert_allclose(values[layer][leaf], expected, rtol=1e-5)
            assert not np.asarray(values[layer][leaf])[..., ~known_columns[0]].any()
    jax.tree.map(np.testing.assert_array_equal, values["head"], attacker.copy["head"])
