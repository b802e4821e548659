"""Frozen tensors: no gradient, no optimizer's state, no delta, no byte back, no change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds_cases import KEY, TRANSFORM, fast, octets

from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.trees import combine, exclude, leaves_by_path, select, select_trained
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.masks import hide
from fedqsn_jax.protocol.proxy import whole_proxy
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.sizes import measure_traffic
from fedqsn_jax.protocol.wire import decode_update, encode_proxy, encode_update
from fedqsn_jax.rounds.aggregation import Contribution, make_aggregator
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_optimizer import unscheduled
from fedqsn_jax.simulation.memory import client_bytes

BIASES = {"hidden_0/bias", "hidden_1/bias", "head/bias"}


@pytest.fixture(scope="module")
def trained(model):
    return select_trained(model.params, ("head", "biases"))


def test_names_and_patterns(model, trained):
    assert trained == BIASES | {"head/kernel"}
    assert select_trained(model.params, ("hidden_?/kernel",)) == {
        "hidden_0/kernel",
        "hidden_1/kernel",
    }
    assert select_trained(model.params, ("all", "biases")) is None
    assert select_trained(model.params, ("biases", "*/kernel")) is None
    with pytest.raises(ValueError, match="'norms' names no tensor; allowed are all, lora, biases"):
        select_trained(model.params, ("biases", "norms"))


def test_trees_with_gaps(model, trained):
    some, rest = select(model.params, trained), exclude(model.params, trained)
    assert set(leaves_by_path(some)) == trained
    assert set(leaves_by_path(rest)) == set(leaves_by_path(model.params)) - trained
    for joined in (combine(some, rest), combine(rest, some), combine(some, model.params)):
        assert jax.tree.structure(joined) == jax.tree.structure(model.params)
        assert octets(joined) == octets(model.params)
    assert select(model.params, None) is model.params
    assert not jax.tree.leaves(exclude(model.params, None))


@pytest.fixture(scope="module")
def labels(model, trained):
    """Which tensors are trained, for optax's own way of leaving tensors alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "/".join(key.key for key in path) in trained, model.params
    )


@pytest.fixture(scope="module")
def proxy(model):
    @fast
    def make(params):
        whole = whole_proxy(params, model.sites)
        state = TRANSFORM.init(KEY, whole)
        return TRANSFORM.apply(KEY, state, TRANSFORM.prepare(state, whole))

    return make(model.params)


@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_a_client_trains_as_with_an_optimizer_that_leaves_frozen_tensors_alone(
    model, data, trained, labels, proxy, proximal
):
    results = []
    adam = optax.adamw(0.05, weight_decay=0.1)
    for selection, optimizer in (
        (trained, adam),
        (None, optax.partition({True: adam, False: optax.set_to_zero()}, labels)),
    ):
        update = make_client_update(
            model.apply_fn,
            classification(),
            unscheduled(optimizer),
            4,
            steps=3,
            trained=selection,
            proximal=proximal,
        )
        results.append(fast(update.train)(KEY, proxy, data, jnp.int32(2)))
    ours, theirs = results
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)
    assert set(leaves_by_path(ours.delta)) == trained
    for path, delta in leaves_by_path(ours.delta).items():
        np.testing.assert_allclose(delta, leaves_by_path(theirs.delta)[path], rtol=1e-5, atol=1e-6)
        assert np.asarray(delta).any()


def test_the_server_leaves_frozen_tensors_alone_bit_for_bit(model, trained, labels):
    """Also its momentum, decay and norms, which never meet one."""
    server = optax.chain(
        optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.5, 0.9)
    )
    delta = jax.tree.map(lambda leaf: leaf + 1, model.params)
    results = []
    for selection, optimizer in (
        (trained, server),
        (None, optax.partition({True: server, False: optax.set_to_zero()}, labels)),
    ):
        aggregator = make_aggregator(model.sites, optimizer, trained=selection)
        finish = fast(aggregator.finish)
        params, state = model.params, aggregator.init(model.params)
        total = Contribution(select(delta, selection), jnp.float32(5), {}, jnp.uint32(0))
        for _ in range(2):
            params, state = finish(params, state, total, {})
        results.append((params, state))
    (ours, state), (theirs, _) = results
    for path, leaf in leaves_by_path(ours).items():
        start = leaves_by_path(model.params)[path]
        if path in trained:
            np.testing.assert_allclose(leaf, leaves_by_path(theirs)[path], rtol=1e-6)
            assert (np.asarray(leaf) != np.asarray(start)).any()
        else:
            assert octets(leaf) == octets(start)
    entries = sum(leaf.size for leaf in jax.tree.leaves(select(model.params, trained)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == entries


def test_a_clients_state_holds_trained_tensors_and_its_masked_frozen_ones(model, trained):
    task, adam = classification(), unscheduled(optax.adam(0.1))
    update = make_client_update(model.apply_fn, task, adam, 4, trained=trained, proximal=0.1)

    def make(params):
        whole = whole_proxy(params, model.sites)
        state = TRANSFORM.init(KEY, whole)
        proxy = TRANSFORM.apply(KEY, state, TRANSFORM.prepare(state, whole))
        training = update.start(proxy, jnp.int32(5))
        return training, update.shared(proxy), update.finish(proxy, jnp.int32(5), training).delta

    training, shared, delta = jax.eval_shape(make, model.params)
    kernels = {"hidden_0/kernel", "hidden_1/kernel"}
    for tree in (training.params, training.anchor, delta):
        assert set(leaves_by_path(tree)) == trained
    assert set(leaves_by_path(training.frozen)) == kernels
    assert not jax.tree.leaves(shared)
    whole = jax.eval_shape(lambda params: update.shared(whole_proxy(params, Sites())), model.params)
    assert set(leaves_by_path(whole)) == kernels
    # Adam's two moments and its count.
    moments = 2 * (10 + 8 + 3 + 24) + 1
    assert sum(leaf.size for leaf in jax.tree.leaves(training.optimizer_state)) == moments
    batch = {"x": jnp.zeros((4, 6)), "label": jnp.zeros(4, jnp.int32)}
    needs = [
        client_bytes(
            model.apply_fn,
            task,
            adam,
            model.params,
            batch,
            trained=selection,
            proximal=proximal,
        )
        for selection, proximal in ((None, 0.1), (trained, 0.1), (trained, 0.0))
    ]
    # Of the frozen kernels neither effective weights, nor those of the start, nor gradient nor
    # moments.
    assert needs[0] - needs[1] >= 4 * 5 * (60 + 80)
    assert needs[1] - needs[2] == 4 * (10 + 8 + 3 + 24)


def test_what_returns_is_what_was_trained(model, trained, proxy):
    layout = Layout.of(proxy, trained=trained)
    seen = {path: int(np.asarray(mask).sum()) for path, mask in proxy.visible.items()}
    cost = measure_traffic(TRANSFORM, model.params, model.sites, trained=trained)

    delta = select(hide(model.params, model.sites, proxy.visible), trained)
    payload = encode_update(delta, proxy.visible, layout)
    # Header; bitmaps of 10 and 8 columns; visible biases and the head, 4 bytes each.
    assert len(payload) == 48 + 2 + 1 + 4 * (sum(seen.values()) + 3 + 24) == cost.up.of(seen)
    returned, visible = decode_update(payload, layout)
    assert jax.tree.structure(returned) == jax.tree.structure(delta)
    assert octets((returned, visible)) == octets((delta, proxy.visible))
    # A client that trains other tensors is not understood, and down nothing is left out.
    with pytest.raises(ValueError, match="another model structure"):
        decode_update(payload, Layout.of(proxy))
    with pytest.raises(ValueError, match="shape of 'hidden_0/kernel' is"):
        encode_update(model.params, proxy.visible, layout)
    assert len(encode_proxy(proxy)) == cost.down.of(seen)
    # Kernels alone: of the bias's masks nothing need be said where only the head is trained.
    head = frozenset({"head/kernel"})
    alone = measure_traffic(TRANSFORM, model.params, model.sites, trained=head)
    assert alone.up.of(seen) == 48 + 4 * 24
    assert cost.fedavg_up == 48 + 4 * (60 + 10 + 80 + 8 + 24 + 3)
