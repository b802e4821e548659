"""Local training, against plain loops that multiply the parameters by the scale at every step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.client import make_client_update
from fedqsn_jax.data.federated import single_client
from fedqsn_jax.masking import hide, leaves_by_path
from fedqsn_jax.proxy import Proxy, chain, dequantize_proxy, quantize, server_mask, whole_proxy
from fedqsn_jax.quantization import NormalFloat
from fedqsn_jax.tasks import Task, classification

KEY = jax.random.key(1)
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


def train(update, proxy, data, client_id, key=KEY, extra=0):
    """One client's result; ``extra`` steps beyond its own."""

    @jax.jit
    def run(key, proxy, data, client_id, extra):
        bound = update.step_count(data.rows(client_id)) + extra
        return update.update(key, proxy, data, client_id, bound)

    return run(key, proxy, data, jnp.int32(client_id), jnp.int32(extra))


# A task that records: its gradient says which rows a step has seen.

SUM = Task(
    loss=lambda outputs, batch, valid: jnp.where(valid, outputs, 0).sum(),
    statistics=lambda outputs, batch, valid: {},
    summarize=lambda sums: sums,
    score="",
)


def recorded_batches(data, client_id, batch_size, key=KEY, **length):
    """The rows of each local step, bool ``[steps, rows of all clients]``.

    Every row has a parameter of its own, with gradient one where the row is in the batch. The
    step that is numbered t has the learning rate 2**t, so the deltas' bits are the steps.
    """
    total = int(data.offsets[-1])
    rows = data.replace(examples={"row": jnp.arange(total)})
    optimizer = optax.sgd(lambda count: 2.0**count)
    update = make_client_update(
        lambda params, batch, key: params["w"][batch["row"]], SUM, optimizer, batch_size, **length
    )
    proxy = whole_proxy({"w": jnp.zeros(total)}, ())
    result = train(update, proxy, rows, client_id, key)
    codes = np.round(-np.asarray(result.delta["w"])).astype(int)
    steps = int(update.step_count(rows.rows(jnp.int32(client_id))))
    assert codes.max() < 2**steps <= 2**24, "exact in float32"
    return np.array([(codes >> step) & 1 for step in range(steps)], bool)


@pytest.mark.parametrize(("batch_size", "epochs"), [(1, 1), (3, 2), (4, 3), (12, 2), (20, 2)])
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
    first = recorded_batches(data, 2, 3, epochs=2)
    assert (first[:4] != first[4:]).any()
    assert (recorded_batches(data, 2, 3, epochs=2) == first).all()
    assert (recorded_batches(data, 2, 3, key=jax.random.key(2), epochs=2) != first).any()


def test_a_number_of_steps_may_end_within_an_epoch(data):
    batches = recorded_batches(data, 2, 5, steps=8)
    np.testing.assert_array_equal(batches.sum(axis=1), [5, 5, 2, 5, 5, 2, 5, 5])
    np.testing.assert_array_equal(batches[:3].sum(axis=0), batches[3:6].sum(axis=0))
    # The same order as by epochs.
    np.testing.assert_array_equal(batches[:6], recorded_batches(data, 2, 5, epochs=2))


@pytest.mark.parametrize(("batch_size", "epochs", "steps"), [(4, 1, 0), (1, 3, 0), (7, 2, 5)])
def test_step_count(data, batch_size, epochs, steps):
    update = make_client_update(None, SUM, None, batch_size, steps=steps, epochs=epochs)
    rows = np.diff(data.offsets)
    expected = [(steps or epochs * math.ceil(n / batch_size)) if n else 0 for n in rows]
    counts = update.step_count(jnp.asarray(rows))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, expected)


# Against a plain loop in NumPy: backpropagation by hand, float64.


def numpy_loss_and_gradient(params, x, labels):
    names = ["hidden_0", "hidden_1", "head"]
    inputs = []
    for name in names:
        inputs.append(x)
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == "head" else np.tanh(x)
    odds = np.exp(x - x.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    loss = -np.log(odds[np.arange(len(labels)), labels]).mean()
    error = (odds - np.eye(odds.shape[1])[labels]) / len(labels)
    gradient = {}
    for index, name in reversed(list(enumerate(names))):
        gradient[name] = {"kernel": inputs[index].T @ error, "bias": error.sum(axis=0)}
        error = (error @ params[name]["kernel"].T) * (1 - inputs[index] ** 2)
    return loss, gradient


def numpy_factors(proxy):
    """What theta is multiplied by: the scale on visible columns, zero on hidden ones."""
    factors = jax.tree.map(lambda leaf: np.ones(leaf.shape), proxy.params)
    for path, seen in proxy.visible.items():
        factor = np.asarray(seen)[0] * float(proxy.scale[path])
        layer = path.partition("/")[0]
        factors[layer] = {"kernel": factors[layer]["kernel"] * factor, "bias": factor}
    return factors


def numpy_client(proxy, data, batches, rate):
    """Masked SGD on theta, whose loss sees theta * scale; the delta and the losses."""
    x, labels = np.asarray(data.examples["x"], np.float64), np.asarray(data.examples["label"])
    factors = numpy_factors(proxy)
    start = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), proxy.params)
    theta, losses = start, []
    for batch in batches:
        effective = jax.tree.map(np.multiply, theta, factors)
        loss, gradient = numpy_loss_and_gradient(effective, x[batch], labels[batch])
        theta = jax.tree.map(lambda t, g, f: t - rate * f * g, theta, gradient, factors)
        losses.append(loss)
    return jax.tree.map(np.subtract, theta, start), losses


def assert_close(tree, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        tree,
        expected,
    )


@pytest.mark.parametrize(("client_id", "batch_size"), [(2, 5), (0, 5), (5, 5), (6, 32)])
def test_sgd_is_the_numpy_loop(model, masked, data, client_id, batch_size):
    task, rate = classification(), 0.2
    update = make_client_update(model.apply_fn, task, optax.sgd(rate), batch_size, epochs=3)
    result = train(update, masked, data, client_id)
    batches = recorded_batches(data, client_id, batch_size, epochs=3)
    delta, losses = numpy_client(masked, data, batches, rate)
    assert_close(result.delta, delta)
    np.testing.assert_allclose(result.loss, np.mean(losses), rtol=1e-5)
    assert int(result.examples) == batches.any(axis=0).sum()
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(delta)) > 0.05, "it did train"


OPTIMIZERS = {
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "adam": optax.adam(0.01),
    "momentum": optax.sgd(0.1, 0.9),
    "clipped": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_act_on_the_received_values(model, masked, data, name):
    optimizer, task, batch_size = OPTIMIZERS[name], classification(), 5
    update = make_client_update(model.apply_fn, task, optimizer, batch_size, steps=6)
    result = train(update, masked, data, 2)

    factors = jax.tree.map(jnp.asarray, numpy_factors(masked))

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(theta, batch):
        effective = jax.tree.map(lambda t, f: t * f.astype(jnp.float32), theta, factors)
        outputs = model.apply_fn(effective, batch, None)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()

    theta, losses = masked.params, []
    state = optimizer.init(theta)
    step = jax.jit(optimizer.update)
    for batch in recorded_batches(data, 2, batch_size, steps=6):
        rows = {key: values[np.flatnonzero(batch)] for key, values in data.examples.items()}
        loss, gradient = loss_and_gradient(theta, rows)
        updates, state = step(gradient, state, theta)
        theta = optax.apply_updates(theta, updates)
        losses.append(float(loss))
    assert_close(result.delta, jax.tree.map(lambda a, b: a - b, theta, masked.params))
    np.testing.assert_allclose(result.loss, np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hidden_columns_get_no_change(model, masked, data, set_hidden, name):
    update = make_client_update(model.apply_fn, classification(), OPTIMIZERS[name], 5, steps=6)
    delta = train(update, masked, data, 2).delta
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(delta))
    zeroed = set_hidden(delta, model.sites, masked.visible, 0.0)
    jax.tree.map(np.testing.assert_array_equal, delta, zeroed)
    moved = leaves_by_path(delta)
    for site in model.sites:
        changed = np.asarray(moved[site.path]).any(axis=0)
        np.testing.assert_array_equal(changed, masked.visible[site.path][0])


@pytest.mark.parametrize("client_id", [0, 1, 2, 5])
def test_steps_beyond_a_clients_own_change_nothing(model, masked, data, client_id):
    update = make_client_update(
        model.apply_fn, classification(), optax.adamw(0.01, weight_decay=0.1), 4, epochs=2
    )
    exact = train(update, masked, data, client_id)
    longer = train(update, masked, data, client_id, extra=9)
    jax.tree.map(np.testing.assert_array_equal, exact, longer)


@pytest.mark.parametrize("length", [{"epochs": 2}, {"steps": 3}])
def test_a_client_without_rows_brings_nothing(model, masked, data, length):
    for proxy in (masked, whole_proxy(model.params, model.sites)):
        optimizer = optax.adamw(0.1, weight_decay=0.5)
        update = make_client_update(model.apply_fn, classification(), optimizer, 4, **length)
        result = train(update, proxy, data, 1, extra=2)
        for leaf in jax.tree.leaves(result):
            np.testing.assert_array_equal(leaf, 0)
        assert jax.tree.map(jnp.shape, result.delta) == jax.tree.map(jnp.shape, model.params)


def test_population_without_any_row(model, masked, data):
    """Nothing is read where there is nothing: an empty client in an empty population."""
    empty = single_client({name: values[:0] for name, values in data.examples.items()})
    assert jax.tree.leaves(empty.examples)[0].shape[0] == 0
    update = make_client_update(model.apply_fn, classification(), optax.sgd(0.1), 4)
    assert int(update.step_count(empty.rows(jnp.int32(0)))) == 0


def test_vmapped_clients_are_the_clients_alone(model, masked, data):
    update = make_client_update(model.apply_fn, classification(), optax.adam(0.01), 4, epochs=2)
    ids, bound = jnp.arange(8, dtype=jnp.int32), jnp.int32(6)
    keys = jax.random.split(KEY, 8)
    batched = jax.jit(jax.vmap(update.update, in_axes=(0, None, None, 0, None)))
    together = batched(keys, masked, data, ids, bound)
    alone = jax.jit(update.update)
    for index in (0, 1, 2, 7):
        one = alone(keys[index], masked, data, ids[index], bound)
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], together), one)


def test_training_starts_from_dequantized_values(model, data):
    """A quantized proxy trains as the proxy of the values that its codes stand for."""
    transform = chain(quantize(NormalFloat(3, 4)), server_mask(0.3))
    whole = whole_proxy(model.params, model.sites)
    proxy = transform.prepare(transform.init(KEY, whole), whole)
    update = make_client_update(model.apply_fn, classification(), optax.sgd(0.2), 5, epochs=2)
    result = train(update, proxy, data, 2)
    values = dequantize_proxy(proxy)
    assert_close(result, train(update, values, data, 2))
    delta, _ = numpy_client(values, data, recorded_batches(data, 2, 5, epochs=2), 0.2)
    assert_close(result.delta, delta)


def test_every_step_has_a_key_of_its_own(data):
    """A model whose gradient is a random number: the increments over steps are all different."""

    def apply_fn(params, batch, key):
        return params["w"] * jax.random.uniform(key) * jnp.ones(batch["x"].shape[0])

    proxy = whole_proxy({"w": jnp.float32(0)}, ())
    increments = []
    for key in (KEY, jax.random.key(2)):
        deltas = [0.0]
        for steps in range(1, 5):
            update = make_client_update(apply_fn, SUM, optax.sgd(1.0), 1, steps=steps)
            deltas.append(float(train(update, proxy, data, 2, key).delta["w"]))
        increments += (-np.diff(deltas)).round(5).tolist()
    assert len(set(increments)) == 8
    assert all(0 <= value < 1 for value in increments)


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_parameters_of_a_narrow_dtype(model, data, name):
    """bfloat16 parameters train; the delta is float32 and near that of float32 parameters."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    update = make_client_update(model.apply_fn, classification(), OPTIMIZERS[name], 5, steps=3)
    transform = server_mask(0.3)
    deltas = []
    for params in (narrow, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)):
        whole = whole_proxy(params, model.sites)
        proxy = transform.prepare(transform.init(KEY, whole), whole)
        deltas.append(train(update, proxy, data, 2).delta)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(deltas[0]))
    assert_close(*deltas, tolerance=0.02)
