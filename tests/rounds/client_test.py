"""Local training, against plain loops that multiply the parameters by the scale at every step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.core.tasks import Task, classification
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.protocol.masks import hide
from fedqsn_jax.protocol.proxy import (
    Proxy,
    chain,
    dequantize_proxy,
    quantize,
    server_mask,
    whole_proxy,
)
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_optimizer import unscheduled

KEY = jax.random.key(1)
FAST = {"xla_backend_optimization_level": 0}
"""Most of these tests' time is compilation. Tests of exact equality go without this."""
SCALES = {"hidden_0/kernel": 1.7, "hidden_1/kernel": 2.4}


@pytest.fixture(scope="module")
def masked(model):
    """A proxy of the model with a third of its columns hidden, and a factor of its own a site."""
    rng = np.random.default_rng(0)
    visible = {
        site.path: jnp.asarray(rng.permutation(site.columns)[None] % 3 > 0) for site in model.sites
    }
    scale = {path: jnp.float32(value) for path, value in SCALES.items()}
    return Proxy(hide(model.params, model.sites, visible), visible, scale, model.sites)


def compiled(update, options=None):
    """One program for every client and key."""
    return jax.jit(update.train, compiler_options=options)


compiled_fast = functools.cache(lambda update: compiled(update, FAST))


def train(update, proxy, data, client_id, key=KEY):
    """One client's result, for comparisons up to rounding."""
    return compiled_fast(update)(key, proxy, data, client_id)


# A task that records: its gradient says which rows a step has seen.

SUM = Task(
    loss=lambda outputs, batch, valid: jnp.where(valid, outputs, 0).sum(),
    statistics=lambda outputs, batch, valid: {},
    summarize=lambda sums: sums,
    score="",
)


@functools.cache
def recorder(batch_size, steps, epochs):
    optimizer = optax.sgd(lambda count: 2.0**count)
    return make_client_update(
        lambda params, batch, key: params["w"][batch["row"]],
        SUM,
        unscheduled(optimizer),
        batch_size,
        steps=steps,
        epochs=epochs,
    )


def recorded_batches(data, client_id, batch_size, key=KEY, steps=0, epochs=1):
    """The rows of each local step, bool ``[steps, rows of all clients]``.

    Every row has a parameter of its own, with gradient one where the row is in the batch. The
    step that is numbered t has the learning rate 2**t, so the deltas' bits are the steps.
    """
    total = int(data.offsets[-1])
    rows = data.replace(examples={"row": np.arange(total)})
    update = recorder(batch_size, steps, epochs)
    proxy = whole_proxy({"w": np.zeros(total, np.float32)}, Sites())
    result = train(update, proxy, rows, client_id, key)
    codes = np.round(-np.asarray(result.delta["w"])).astype(int)
    count = int(update.step_count(np.diff(data.offsets)[client_id]))
    assert codes.max() < 2**count <= 2**24, "exact in float32"
    return np.array([(codes >> step) & 1 for step in range(count)], bool)


@pytest.mark.parametrize(("batch_size", "epochs"), [(1, 1), (5, 3), (20, 2)])
def test_an_epoch_has_every_row_once(data, batch_size, epochs):
    client_id, rows = 2, 12
    batches = recorded_batches(data, client_id, batch_size, epochs=epochs)
    per_epoch = math.ceil(rows / batch_size)
    assert len(batches) == epochs * per_epoch
    own = np.zeros(batches.shape[1], bool)
    own[data.offsets[client_id] : data.offsets[client_id + 1]] = True
    for epoch in range(epochs):
        seen = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        np.testing.assert_array_equal(seen.sum(axis=0), own)
        sizes = seen.sum(axis=1)
        assert (sizes[:-1] == batch_size).all()
        assert sizes[-1] == rows - (per_epoch - 1) * batch_size


def test_epochs_and_keys_have_their_own_order(data):
    first = recorded_batches(data, 2, 5, epochs=3)
    assert (first[:3] != first[3:6]).any()
    assert (recorded_batches(data, 2, 5, epochs=3) == first).all()
    assert (recorded_batches(data, 2, 5, key=jax.random.key(2), epochs=3) != first).any()


def test_a_number_of_steps_may_end_within_an_epoch(data):
    batches = recorded_batches(data, 2, 5, steps=8)
    np.testing.assert_array_equal(batches.sum(axis=1), [5, 5, 2, 5, 5, 2, 5, 5])
    np.testing.assert_array_equal(batches[:3].sum(axis=0), batches[3:6].sum(axis=0))
    # The same order as by epochs.
    np.testing.assert_array_equal(batches, recorded_batches(data, 2, 5, epochs=3)[:8])


@pytest.mark.parametrize(("batch_size", "epochs", "steps"), [(4, 1, 0), (1, 3, 0), (7, 2, 5)])
def test_step_count(data, batch_size, epochs, steps):
    update = make_client_update(None, SUM, None, batch_size, steps=steps, epochs=epochs)
    rows = np.diff(data.offsets)
    expected = [(steps or epochs * math.ceil(n / batch_size)) if n else 0 for n in rows]
    counts = update.step_count(jnp.asarray(rows))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, expected)


# Against a plain loop in NumPy, float64.


def numpy_factors(proxy):
    """What theta is multiplied by: the scale on visible columns, zero on hidden ones."""
    factors = jax.tree.map(lambda leaf: np.ones(leaf.shape), proxy.params)
    for path, seen in proxy.visible.items():
        factor = np.asarray(seen)[0] * float(proxy.scale[path])
        layer = path.partition("/")[0]
        factors[layer] = {"kernel": factors[layer]["kernel"] * factor, "bias": factor}
    return factors


def numpy_client(loss_and_gradient, proxy, data, batches, rate, proximal=0.0):
    """Masked SGD on theta, whose loss sees theta * scale; the delta and the losses.

    The proximal term is FedProx's, of theta.
    """
    x, labels = np.asarray(data.examples["x"], np.float64), np.asarray(data.examples["label"])
    factors = numpy_factors(proxy)
    start = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), proxy.params)
    theta, losses = start, []
    for batch in batches:
        effective = jax.tree.map(np.multiply, theta, factors)
        loss, gradient = loss_and_gradient(effective, x[batch], labels[batch])
        theta = jax.tree.map(
            lambda t, g, f, s: t - rate * (f * g + proximal * (t - s)),
            theta,
            gradient,
            factors,
            start,
        )
        losses.append(loss)
    return jax.tree.map(np.subtract, theta, start), losses


def assert_close(tree, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        tree,
        expected,
    )


@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_sgd_is_the_numpy_loop(model, masked, data, numpy_loss_and_gradient, proximal):
    rate, batch_size, epochs = 0.2, 5, 3
    optimizer = optax.sgd(rate)
    update = make_client_update(
        model.apply_fn,
        classification(),
        unscheduled(optimizer),
        5,
        epochs=epochs,
        proximal=proximal,
    )
    for client_id in (2, 0, 5, 6):
        result = train(update, masked, data, client_id)
        batches = recorded_batches(data, client_id, batch_size, epochs=epochs)
        delta, losses = numpy_client(numpy_loss_and_gradient, masked, data, batches, rate, proximal)
        assert_close(result.delta, delta)
        np.testing.assert_allclose(result.loss, np.mean(losses), rtol=1e-5)
        assert int(result.examples) == batches.any(axis=0).sum()
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(delta)) > 0.05, "it did train"


OPTIMIZERS = {
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "clipped_momentum": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5, 0.9)),
}


@pytest.fixture(scope="module")
def updates(model):
    """Three epochs in batches of five by each optimizer; shared, as each is compiled once."""
    task = classification()
    return {
        name: make_client_update(model.apply_fn, task, unscheduled(optimizer), 5, epochs=3)
        for name, optimizer in OPTIMIZERS.items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_act_on_the_received_values(model, masked, data, set_hidden, updates, name):
    optimizer, result = OPTIMIZERS[name], train(updates[name], masked, data, 2)

    factors = numpy_factors(masked)

    def loss_fn(theta, batch):
        effective = jax.tree.map(lambda t, f: t * f.astype(np.float32), theta, factors)
        outputs = model.apply_fn(effective, batch, None)
        each = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
        return (each * batch["weight"]).sum()

    @functools.partial(jax.jit, compiler_options=FAST)
    def step(theta, state, batch):
        loss, gradient = jax.value_and_grad(loss_fn)(theta, batch)
        updates, state = optimizer.update(gradient, state, theta)
        return optax.apply_updates(theta, updates), state, loss

    theta, losses = masked.params, []
    state = optimizer.init(theta)
    for batch in recorded_batches(data, 2, 5, epochs=3):
        weight = (batch / batch.sum()).astype(np.float32)
        theta, state, loss = step(theta, state, {**data.examples, "weight": weight})
        losses.append(float(loss))
    expected = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), theta, masked.params)
    assert_close(result.delta, expected)
    np.testing.assert_allclose(result.loss, np.mean(losses), rtol=1e-5)

    # Hidden columns do not move, visible ones do.
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result.delta))
    zeroed = set_hidden(result.delta, model.sites, masked.visible, 0.0)
    jax.tree.map(np.testing.assert_array_equal, result.delta, zeroed)
    for site in model.sites:
        changed = np.asarray(leaves_by_path(result.delta)[site.path]).any(axis=0)
        np.testing.assert_array_equal(changed, masked.visible[site.path][0])


def test_a_client_without_rows_brings_nothing(model, masked, data):
    """Compiled as a user's program is: not even a rounding error."""
    optimizer = optax.adamw(0.01, weight_decay=0.1)
    update = make_client_update(
        model.apply_fn, classification(), unscheduled(optimizer), 4, epochs=2
    )
    result = compiled(update)(KEY, masked, data, 1)
    for leaf in jax.tree.leaves(result):
        np.testing.assert_array_equal(leaf, 0)
    assert jax.tree.map(jnp.shape, result.delta) == jax.tree.map(jnp.shape, model.params)


def test_vmapped_clients_are_the_clients_alone(masked, data, updates):
    update = updates["adamw"]
    ids, keys = np.arange(8, dtype=np.int32), jax.random.split(KEY, 8)
    batched = jax.jit(jax.vmap(update.train, in_axes=(0, None, None, 0)), compiler_options=FAST)
    together = jax.device_get(batched(keys, masked, data, ids))
    for index in ids:
        one = train(update, masked, data, index, keys[index])
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], together), one)


def test_training_starts_from_dequantized_values(model, data, numpy_loss_and_gradient):
    """A quantized proxy trains as the proxy of the values that its codes stand for."""
    transform = chain(quantize(NormalFloat(3, 4)), server_mask(0.3))
    whole = whole_proxy(model.params, model.sites)
    proxy = transform.prepare(transform.init(KEY, whole), whole)
    update = make_client_update(
        model.apply_fn, classification(), unscheduled(optax.sgd(0.2)), 5, epochs=3
    )
    result = train(update, proxy, data, 2)
    batches = recorded_batches(data, 2, 5, epochs=3)
    values = dequantize_proxy(proxy)
    delta, _ = numpy_client(numpy_loss_and_gradient, values, data, batches, 0.2)
    assert_close(result.delta, delta)


def test_every_step_has_a_key_of_its_own(data):
    """The gradient is a random number, and each step moves an entry of its own."""

    def apply_fn(params, batch, key):
        return params["w"].sum() * jax.random.uniform(key) * jnp.ones(batch["x"].shape[0])

    def move_one_entry(updates, count, params=None):
        del params
        one = jnp.arange(6) == count
        return jax.tree.map(lambda leaf: jnp.where(one, leaf, 0), updates), count + 1

    optimizer = optax.GradientTransformation(lambda params: jnp.int32(0), move_one_entry)
    update = make_client_update(apply_fn, SUM, unscheduled(optimizer), 1, steps=6)
    proxy = whole_proxy({"w": jnp.zeros(6)}, Sites())
    deltas = [train(update, proxy, data, 2, key).delta["w"] for key in (KEY, jax.random.key(2))]
    values = np.concatenate(deltas)
    assert len(np.unique(values)) == 12
    assert ((values >= 0) & (values < 1)).all()


def test_parameters_of_a_narrow_dtype(masked, data, updates):
    """bfloat16 parameters train; the delta is float32 and near that of float32 parameters."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), masked.params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    update = updates["adamw"]
    delta, expected = (
        train(update, masked.replace(params=params), data, 2).delta for params in (narrow, wide)
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(delta))
    assert_close(delta, expected, tolerance=0.02)
