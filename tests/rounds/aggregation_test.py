"""Aggregation: means against NumPy, and hidden columns that nothing touches (invariant 2)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.rounds.aggregation import make_aggregator

FAST = {"xla_backend_optimization_level": 0}
"""Most of these tests' time is compilation."""
EXAMPLES = (5, 0, 3, 8)

OPTIMIZERS = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(0.5, 0.9),
    "adam": optax.adam(0.1),
    "yogi": optax.yogi(0.1),
    "adagrad": optax.adagrad(0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "clipped_decay": optax.chain(
        optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1), optax.sgd(1.0)
    ),
}


@pytest.fixture(scope="module")
def server_visible(model):
    rng = np.random.default_rng(0)
    return {site.path: rng.permutation(site.columns)[None] % 3 > 0 for site in model.sites}


@pytest.fixture(scope="module")
def clients(model, server_visible, set_hidden):
    """Four clients: deltas, visible columns, examples. No one sees one of the columns."""
    rng = np.random.default_rng(1)
    result = []
    for examples in EXAMPLES:
        visible = {}
        for path, seen in server_visible.items():
            visible[path] = seen & (rng.random(seen.shape) < 0.6)
            visible[path][0, np.flatnonzero(seen[0])[0]] = False
        delta = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), model.params)
        delta = jax.device_get(set_hidden(delta, model.sites, visible, 0.0))
        result.append((delta, visible, np.int32(examples)))
    return result


def compiled(aggregator):
    """``(params, state, clients, server_visible) -> (params, state)``."""

    def run(params, state, stacked, server_visible):
        deltas, visible, examples = stacked
        weights = aggregator.weigh(examples)
        parts = jax.vmap(aggregator.contribute)(deltas, weights, visible)
        total = jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), parts)
        return aggregator.finish(params, state, total, server_visible)

    program = jax.jit(run, compiler_options=FAST)
    return lambda params, state, clients, server_visible: program(
        params, state, jax.tree.map(lambda *leaves: np.stack(leaves), *clients), server_visible
    )


def octets(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def columns_of(tree, model, path):
    """The kernel and bias of a dense site, one row a column."""
    layer = path.partition("/")[0]
    assert path in {site.path for site in model.sites}
    tree = jax.device_get(tree)
    return np.concatenate([tree[layer]["kernel"], tree[layer]["bias"][None]]).T


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hidden_entries_never_change_and_never_show(
    model, clients, server_visible, set_hidden, name
):
    """Whatever hidden entries hold, even where a client's delta dares to be nonzero there."""
    aggregator = make_aggregator(model.sites, OPTIMIZERS[name])
    step = compiled(aggregator)
    fewer = [(d, v, n * np.int32(n < 5)) for d, v, n in clients]
    bold = [(jax.tree.map(lambda x: x + np.float32(0.1), d), v, n) for d, v, n in clients]
    after = {}
    for value in (np.nan, 3.0, np.inf):
        start = set_hidden(model.params, model.sites, server_visible, value)
        params, state = start, aggregator.init(start)
        for cohort in (clients, fewer, bold, clients):
            params, state = step(params, state, cohort, server_visible)
        for path, seen in server_visible.items():
            now, before = columns_of(params, model, path), columns_of(start, model, path)
            assert now[~seen[0]].tobytes() == before[~seen[0]].tobytes()
        after[value] = (set_hidden(params, model.sites, server_visible, 0.0), state)
    assert octets(after[np.nan]) == octets(after[3.0]) == octets(after[np.inf])
    for leaf in jax.tree.leaves(after[np.nan]):
        assert np.isfinite(leaf).all()
    for path, seen in server_visible.items():
        change = columns_of(after[3.0][0], model, path) != columns_of(model.params, model, path)
        covered = np.any([visible[path] for _, visible, n in clients if n], axis=0)
        assert change[(seen & covered)[0]].any(axis=1).all(), "what was seen did change"
        assert not change[(seen & ~covered)[0]].any(), "what nobody saw did not"


@pytest.mark.parametrize("normalize", ["mean", "coverage"])
@pytest.mark.parametrize("weighting", ["data", "uniform"])
def test_means_are_numpys(model, clients, server_visible, weighting, normalize):
    aggregator = make_aggregator(
        model.sites, optax.sgd(1.0), weighting=weighting, normalize=normalize
    )
    state = aggregator.init(model.params)
    params, _ = compiled(aggregator)(model.params, state, clients, server_visible)
    weights = [n if weighting == "data" else float(n > 0) for n in EXAMPLES]
    expected = jax.tree.map(lambda x: np.array(x, np.float64), model.params)
    for path, leaf in leaves_by_path(expected).items():
        layer = path.partition("/")[0]
        for column in range(leaf.shape[-1]):
            seen = [
                v.get(f"{layer}/kernel", np.ones((1, 99), bool))[0, column] for _, v, _ in clients
            ]
            divisor = sum(w for w, s in zip(weights, seen, strict=True) if s or normalize == "mean")
            total = sum(
                w * leaves_by_path(delta)[path][..., column]
                for w, (delta, _, _) in zip(weights, clients, strict=True)
            )
            leaf[..., column] += total / divisor if divisor else 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected
    )


def test_mean_by_hand(model):
    """One client of 3 rows moves everything by 1, one of 1 row by 5: the mean is 2."""
    aggregator = make_aggregator(model.sites, optax.sgd(1.0))
    parts = [
        (jax.tree.map(lambda x, by=move: np.full(x.shape, by, np.float32), model.params), {}, rows)
        for move, rows in ((1, np.int32(3)), (5, np.int32(1)))
    ]
    state = aggregator.init(model.params)
    params, _ = compiled(aggregator)(model.params, state, parts, {})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b + 2, rtol=1e-6),
        *jax.device_get((params, model.params)),
    )


def test_a_client_without_weight_adds_nothing(model):
    for weighting in ("data", "uniform"):
        aggregator = make_aggregator(model.sites, optax.sgd(1.0), weighting=weighting)
        delta = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), model.params)
        visible = {site.path: np.ones((1, site.columns), bool) for site in model.sites}
        part = aggregator.contribute(delta, aggregator.weigh(np.int32(0)), visible)
        for leaf in jax.tree.leaves(part):
            np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
    ("name", "normalize"), [("momentum", "coverage"), ("adam", "mean"), ("lamb", "mean")]
)
def test_no_weight_no_change(model, clients, server_visible, set_hidden, name, normalize):
    """A cohort of clients without rows: parameters and optimizer state keep every byte."""
    aggregator = make_aggregator(model.sites, OPTIMIZERS[name], normalize=normalize)
    step = compiled(aggregator)
    start = set_hidden(model.params, model.sites, server_visible, np.nan)
    params, state = step(start, aggregator.init(start), clients, server_visible)
    idle = [(delta, visible, np.int32(0)) for delta, visible, _ in clients]
    assert octets(step(params, state, idle, server_visible)) == octets((params, state))


@pytest.mark.parametrize("normalize", ["mean", "coverage"])
def test_a_column_that_nobody_saw_stays(model, clients, server_visible, set_hidden, normalize):
    """Even if momentum or weight decay would move it; its bias stays too."""
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, 0.9))
    aggregator = make_aggregator(model.sites, optimizer, normalize=normalize)
    step = compiled(aggregator)
    params, state = step(model.params, aggregator.init(model.params), clients, server_visible)
    later = []
    for delta, visible, examples in clients:
        if examples:
            visible = {
                path: seen & (np.arange(seen.size) % 2 > 0) for path, seen in visible.items()
            }
            delta = jax.device_get(set_hidden(delta, model.sites, visible, 0.0))
        later.append((delta, visible, examples))
    after, _ = step(params, state, later, server_visible)
    for path in server_visible:
        covered = np.any([visible[path][0] for _, visible, n in later if n], axis=0)
        alone = later[1][1][path][0] & ~covered
        change = (columns_of(after, model, path) != columns_of(params, model, path)).any(axis=1)
        np.testing.assert_array_equal(change, covered)
        assert alone.any(), "the client without rows saw some of these columns"


@pytest.mark.parametrize("name", ["adam", "lamb", "adafactor"])
def test_without_masks_it_is_the_optax_optimizer(model, clients, name):
    """On minus the mean delta as a gradient, for two rounds."""
    optimizer = OPTIMIZERS[name]
    aggregator = make_aggregator(model.sites, optimizer)
    cohort = [(delta, {}, examples) for delta, _, examples in clients]
    step = compiled(aggregator)
    params, state = model.params, aggregator.init(model.params)
    expected, expected_state = model.params, optimizer.init(model.params)
    gradient = jax.tree.map(
        lambda *deltas: -np.average(deltas, axis=0, weights=EXAMPLES).astype(np.float32),
        *[delta for delta, _, _ in clients],
    )
    update = jax.jit(optimizer.update, compiler_options=FAST)
    for _ in range(2):
        params, state = step(params, state, cohort, {})
        updates, expected_state = update(gradient, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, expected
    )


def test_parameters_keep_their_dtype(model, clients, server_visible):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    aggregator = make_aggregator(model.sites, optax.sgd(1.0))
    params, _ = compiled(aggregator)(narrow, aggregator.init(narrow), clients, server_visible)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
