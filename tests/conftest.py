"""Settings and tiny fixtures that tests share: a model, its sites, and a population of clients."""

import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import compilation_effort  # noqa: F401, first of all, as JAX reads what it sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds_cases import fast, shared_federation

from fedqsn_jax.data.population import FederatedData, from_clients
from fedqsn_jax.protocol.sites import Sites, find_sites

# Tracing makes many objects that live long: looking for garbage as often as usual takes a
# twentieth of the tests' time.
gc.set_threshold(200_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

FEATURES, CLASSES = 6, 3
CLIENT_ROWS = (5, 0, 12, 3, 7, 1, 9, 4)


class Model(NamedTuple):
    """A classifier: ``apply_fn(params, batch, key)``, its parameters and its mask sites."""

    apply_fn: Callable[[Any, Any, Any], jax.Array]
    params: Any
    sites: Sites


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """For tests of what programs are for: quick also where the others have full optimization."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def model() -> Model:
    """An MLP with two hidden layers (the sites) and a head (no site); pure functions only."""
    widths = {"hidden_0": (FEATURES, 10), "hidden_1": (10, 8), "head": (8, CLASSES)}
    rng = np.random.default_rng(0)
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(0, 0.1, shape[1:]), jnp.float32),
        }
        for name, shape in widths.items()
    }

    def apply_fn(params, batch, key):
        del key
        x = batch["x"]
        for name in widths:
            x = x @ params[name]["kernel"] + params[name]["bias"].reshape(1, -1)
            x = x if name == "head" else jnp.tanh(x)
        return x

    return Model(apply_fn, params, find_sites(params))


@pytest.fixture(scope="session")
def data() -> FederatedData:
    """Eight clients of unequal sizes, of which client 1 has no rows."""
    rng = np.random.default_rng(1)
    return from_clients(
        [
            {
                "x": rng.normal(size=(rows, FEATURES)).astype(np.float32),
                "label": rng.integers(0, CLASSES, rows).astype(np.int32),
            }
            for rows in CLIENT_ROWS
        ]
    )


@pytest.fixture(scope="session")
def set_hidden() -> Callable[[Any, Sites, Any, float], Any]:
    """``(tree, sites, visible, value)``: NumPy copy of a tree with hidden columns set to a value.

    It walks the sites one column at a time, so it shares no code with the package's masks; it
    knows sites whose axes stand in the order layers, inputs, columns. Sites that ``visible`` lacks
    are left alone.
    """

    def fill(tree, sites, visible, value):
        tree = jax.tree.map(np.array, tree)
        for site in sites:
            *parents, name = site.path.split("/")
            node = tree
            for parent in parents:
                node = node[parent]
            flat = node[name].reshape(site.layers, site.fan_in, site.columns)
            hidden = ~np.asarray(visible.get(site.mask_path, True))
            for layer, column in np.argwhere(hidden) if hidden.ndim else ():
                flat[layer, :, column] = value
                if site.bias_path is not None:
                    node["bias"].reshape(site.layers, site.columns)[layer, column] = value
        return jax.tree.map(jnp.asarray, tree)

    return fill


@pytest.fixture(scope="session")
def numpy_loss_and_gradient() -> Callable[[Any, np.ndarray, np.ndarray], tuple[float, Any]]:
    """``(params, x, labels)``: the model's mean cross-entropy, by backpropagation by hand."""

    def loss_and_gradient(params, x, labels):
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

    return loss_and_gradient


@pytest.fixture(scope="session")
def shared(model: Model) -> tuple[Any, ...]:
    """One federation for several tests, with its functions compiled: Adam on both sides."""
    federation = shared_federation(model)
    return federation, fast(federation.init), fast(federation.round), fast(federation.evaluate)
