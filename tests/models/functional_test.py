"""Adapters: modules of both frameworks as pure functions, and the refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.models.functional import (
    EVALUATION_NAMES,
    TRAINING_NAMES,
    idle_dropouts,
    linen_apply,
    linen_init,
    nnx_split,
    nnx_update,
)
from fedqsn_jax.protocol.sites import find_sites

BATCH = {"image": jnp.ones((8, 6)), "label": jnp.zeros(8, jnp.int32)}


class Train(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(6)(x))


class Training(linen.Module):
    @linen.compact
    def __call__(self, x, *, training):  # No default: `init` must say it too.
        return linen.Dropout(0.5, deterministic=not training)(linen.Dense(6)(x))


class Deterministic(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic: bool = True):
        return linen.Dropout(0.5, deterministic=deterministic)(linen.Dense(6)(x))


class Normalized(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=True)(linen.Dense(6)(x))


class Remembering(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(6)(x) + self.variable("memory", "last", jnp.zeros, (1, 6)).value


class Empty(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x


class Sowing(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(6)(x)
        self.sow("intermediates", "hidden", x)
        return x


class NnxNet(nnx.Module):
    """Two dropouts made from the same random streams, and more than ten layers of one shape."""

    def __init__(self, rngs, layers=12):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(layers)])
        self.first = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return jnp.stack([self.first(x), self.second(x)], axis=-1)


class NnxNormalized(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def linen_pair(module):
    return linen_init(module, jax.random.key(0), BATCH), linen_apply(module)


class DropPath(linen.Module):
    @linen.compact
    def __call__(self, x, is_training=False):
        drop = linen.Dropout(0.5, rng_collection="drop_path")
        return drop(linen.Dense(6)(x), deterministic=not is_training)


class Field(linen.Module):
    deterministic: bool = False

    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=self.deterministic)(linen.Dense(6)(x))


class NnxArgument(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs, rng_collection="drop_path")

    def __call__(self, x, is_training=False):
        return self.drop(self.linear(x), deterministic=not is_training)


class NnxAttribute(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.is_training = False

    def __call__(self, x):
        return self.drop(self.linear(x), deterministic=not self.is_training)


PAIRS = {
    "drop_path": lambda: linen_pair(DropPath()),
    "field": lambda: linen_pair(Field()),
    "nnx_argument": lambda: nnx_split(NnxArgument(nnx.Rngs(0))),
    "nnx_attribute": lambda: nnx_split(NnxAttribute(nnx.Rngs(0))),
    "train": lambda: linen_pair(Train()),
    "training": lambda: linen_pair(Training()),
    "deterministic": lambda: linen_pair(Deterministic()),
    "nnx": lambda: nnx_split(NnxNet(nnx.Rngs(0))),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    """Parameters and function, from every kind of module."""
    params, apply_fn = PAIRS[request.param]()
    # No exact zeros but those that dropout makes.
    return jax.tree.map(lambda leaf: leaf + 0.01, params), apply_fn


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_a_key_decides_dropout(pair, make_key):
    params, apply_fn = pair
    step = jax.jit(apply_fn)
    first, again, other = (step(params, BATCH, make_key(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first == 0, other == 0)
    assert 0.25 < np.mean(np.asarray(first) == 0) < 0.75


def test_without_a_key_nothing_is_dropped(pair):
    params, apply_fn = pair
    outputs = apply_fn(params, BATCH, None)
    assert np.all(np.asarray(outputs) != 0)
    assert np.array_equal(outputs, apply_fn(params, BATCH, None))
    # Dropout keeps the mean: the average over keys approaches what evaluation computes.
    keys = jax.random.split(jax.random.key(0), 4000)
    mean = jax.jit(jax.vmap(apply_fn, (None, None, 0)))(params, BATCH, keys).mean(0)
    np.testing.assert_allclose(mean, outputs, rtol=0.1)


def test_stacked_parameters_equal_single_ones(pair):
    params, apply_fn = pair
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), params)
    keys = jax.random.split(jax.random.key(0), 3)

    def gradient(params, key):
        return jax.grad(lambda p: (apply_fn(p, BATCH, key) ** 2).sum())(params)

    together = jax.jit(jax.vmap(gradient))(stacked, keys)
    one = jax.jit(gradient)
    alone = [one(jax.tree.map(lambda leaf, k=k: leaf[k], stacked), keys[k]) for k in range(3)]
    jax.tree.map(
        lambda a, *e: np.testing.assert_allclose(a, np.stack(e), rtol=1e-4, atol=1e-5),
        together,
        *alone,
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(together))


def test_a_module_without_modes_works_with_and_without_key():
    params, apply_fn = linen_pair(linen.Dense(6))
    assert np.array_equal(apply_fn(params, BATCH, None), apply_fn(params, BATCH, jax.random.key(0)))


def test_the_input_has_the_name_that_is_given():
    batch = {"pixels": jnp.ones((2, 6))}
    module = linen.Dense(3)
    params = linen_init(module, jax.random.key(0), batch, "pixels")
    assert linen_apply(module, "pixels")(params, batch, None).shape == (2, 3)
    params, apply_fn = nnx_split(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), "pixels")
    assert apply_fn(params, batch, None).shape == (2, 3)


def test_linen_parameters_are_those_of_flax():
    module = Train()
    expected = module.init(jax.random.key(7), BATCH["image"])["params"]
    actual = linen_init(module, jax.random.key(7), BATCH)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), actual, expected)


def test_partitioned_parameters_come_out_as_arrays():
    kernel_init = linen.with_partitioning(linen.initializers.ones, ("in", "out"))
    params, apply_fn = linen_pair(linen.Dense(6, kernel_init=kernel_init))
    assert isinstance(params["kernel"], jax.Array)
    assert np.all(np.asarray(apply_fn(params, BATCH, None)) == 6)


def test_sown_values_are_no_obstacle():
    params, apply_fn = linen_pair(Sowing())
    assert list(params) == ["Dense_0"]
    assert apply_fn(params, BATCH, None).shape == (8, 6)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda: linen_init(Normalized(), jax.random.key(0), BATCH), "batch_stats.*GroupNorm"),
        (
            lambda: linen_init(Remembering(), jax.random.key(0), BATCH),
            "'memory': only p.* constants",
        ),
        (lambda: linen_init(Empty(), jax.random.key(0), BATCH), "no parameters"),
        (lambda: nnx_split(NnxNormalized(nnx.Rngs(0))), "norm/.* BatchStat.*GroupNorm"),
    ],
)
def test_what_cannot_be_federated_is_refused_in_one_line(split, message):
    with pytest.raises(ValueError, match=message) as error:
        split()
    assert "\n" not in str(error.value)


def test_nnx_parameters_are_plain_and_complete():
    module = NnxNet(nnx.Rngs(0))
    params, apply_fn = nnx_split(module)
    names = sorted(f"layers/{i}/{name}" for i in range(12) for name in ("bias", "kernel"))
    assert sorted(leaves_by_path(params)) == names
    assert len(find_sites(params)) == 12
    for index, layer in enumerate(module.layers):
        assert np.array_equal(params["layers"][str(index)]["kernel"], layer.kernel[...])
    module.eval()
    np.testing.assert_allclose(apply_fn(params, BATCH, None), module(BATCH["image"]), rtol=1e-6)


def test_nnx_layers_drop_different_units():
    params, apply_fn = nnx_split(NnxNet(nnx.Rngs(0)))
    dropped = np.asarray(apply_fn(params, BATCH, jax.random.key(0))) == 0
    assert not np.array_equal(dropped[..., 0], dropped[..., 1])


def test_nnx_module_is_left_as_it_was():
    module = NnxNet(nnx.Rngs(0))
    params, apply_fn = nnx_split(module)
    before = apply_fn(params, BATCH, jax.random.key(0))
    jax.jit(apply_fn)(jax.tree.map(jnp.zeros_like, params), BATCH, jax.random.key(1))
    assert not module.first.deterministic
    assert float(jnp.abs(module.layers[0].kernel[...]).max()) > 0
    assert np.array_equal(before, apply_fn(params, BATCH, jax.random.key(0)))


def test_nnx_shared_layers_stay_shared():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 6, rngs=rngs)
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    params, apply_fn = nnx_split(Shared(nnx.Rngs(0)))
    assert sorted(leaves_by_path(params)) == ["first/bias", "first/kernel"]
    kernel = params["first"]["kernel"]
    np.testing.assert_allclose(
        apply_fn(params, BATCH, None), BATCH["image"] @ kernel @ kernel, rtol=1e-5
    )


@pytest.mark.parametrize("name", [*TRAINING_NAMES, *EVALUATION_NAMES])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_every_name_of_a_mode_is_told(framework, name):
    """The module returns what it was told; by hand: True in training, or in evaluation."""
    namespace: dict = {"jnp": jnp, "linen": linen}
    source = f"def call(self, x, {name}=None):\n    return jnp.float32({name}) * self.one(x)"
    exec(source, namespace)
    if framework == "linen":

        def setup(self):
            self.one = linen.Dense(1, kernel_init=linen.initializers.ones)

        body = {"setup": setup, "__call__": namespace["call"], "__annotations__": {}}
        params, apply_fn = linen_pair(type("Told", (linen.Module,), body)())
    else:

        def build(self):
            ones = nnx.initializers.ones
            self.one = nnx.Linear(6, 1, kernel_init=ones, rngs=nnx.Rngs(0))

        body = {"__init__": build, "__call__": namespace["call"]}
        params, apply_fn = nnx_split(type("Told", (nnx.Module,), body)())
    trains = [float(apply_fn(params, BATCH, key)[0, 0]) for key in (jax.random.key(0), None)]
    assert trains == ([6.0, 0.0] if name in TRAINING_NAMES else [0.0, 6.0])


class Unknown(linen.Module):
    """It is told in a way that nobody knows."""

    @linen.compact
    def __call__(self, x, learns=False):
        x = linen.Dropout(0.5, deterministic=False, name="acts")(linen.Dense(6)(x))
        return linen.Dropout(0.5, name="idle")(x, deterministic=not learns)


class NnxUnknown(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.acts = nnx.Dropout(0.5, rngs=rngs)
        self.idle = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, learns=False):
        return self.idle(self.acts(self.linear(x)), deterministic=not learns)


def test_dropouts_that_never_act_are_found():
    for module in (Train(), Deterministic(), DropPath(), Field()):
        assert idle_dropouts(module, linen_pair(module)[0], BATCH) == []
    for module in (NnxNet(nnx.Rngs(0)), NnxArgument(nnx.Rngs(0))):
        assert idle_dropouts(module, nnx_split(module)[0], BATCH) == []
    params = {"Dense_0": linen_init(linen.Dense(6), jax.random.key(0), BATCH)}
    assert idle_dropouts(Unknown(), params, BATCH) == ["idle"]
    module = NnxUnknown(nnx.Rngs(0))
    assert idle_dropouts(module, nnx_split(module)[0], BATCH) == ["idle"]


class Recurrent(nnx.Module):
    """It draws random numbers in evaluation, too, and has constants."""

    def __init__(self, cell):
        rngs = nnx.Rngs(0)
        self.recurrent = nnx.RNN(cell(5, 6, rngs=rngs))
        self.head = nnx.Linear(6, 3, rngs=rngs)
        self.shift = jnp.arange(3.0)[None]
        self.scale = nnx.Variable(jnp.full((1, 3), 2.0))

    def __call__(self, x):
        return self.head(self.recurrent(x)[:, -1]) * self.scale[...] + self.shift


@pytest.mark.parametrize("cell", [nnx.GRUCell, nnx.LSTMCell, nnx.SimpleCell])
def test_nnx_recurrent_layers_and_constants_are_what_nnx_makes_of_them(cell):
    batch = {"image": jnp.asarray(np.random.default_rng(0).normal(size=(4, 7, 5)), jnp.float32)}
    params, apply_fn = nnx_split(Recurrent(cell))
    expected = Recurrent(cell)(batch["image"])
    jitted = jax.jit(apply_fn)
    for key in (None, jax.random.key(1), None):
        np.testing.assert_allclose(jitted(params, batch, key), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply_fn(params, batch, None), expected, rtol=1e-5, atol=1e-6)


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return self.linear(x)


def test_an_nnx_variable_that_a_call_changes_is_refused():
    params, apply_fn = nnx_split(Counting(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^calls is changed by a call: only param"):
        jax.eval_shape(lambda: apply_fn(params, BATCH, None))


def test_parameters_are_put_back_into_an_nnx_module():
    source, target = NnxNet(nnx.Rngs(0)), NnxNet(nnx.Rngs(1))
    params, _ = nnx_split(source)
    nnx_update(target, params)
    for module in (source, target):
        module.eval()
    np.testing.assert_array_equal(source(BATCH["image"]), target(BATCH["image"]))
    del params["layers"]["11"]["bias"]
    with pytest.raises(ValueError, match=r"^params: there is no layers/11/bias, which the module"):
        nnx_update(target, params)
    params["layers"]["11"]["bias"] = jnp.zeros(7)
    with pytest.raises(ValueError, match=r"^params: layers/11/bias has shape \[7\]; allowed"):
        nnx_update(target, params)
