"""Models: the convolution against Flax's own, pooling, and what the configured models compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedqsn_jax.config.schema import ModelConfig
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.models.functional import linen_apply, linen_init
from fedqsn_jax.models.image.cnn import CNN
from fedqsn_jax.models.image.mlp import MLP
from fedqsn_jax.models.kernels.convolution import Conv, convolve, max_pool
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.protocol.sites import find_sites


def close(actual, expected, tolerance=1e-5):
    """Compares trees leaf by leaf, relative to each leaf's largest entry."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=tolerance * max(1, np.abs(e).max())),
        actual,
        expected,
    )


def random_params(module, images, *stack):
    """Random parameters of a module; Flax's own initializers take long to compile."""
    shapes = jax.eval_shape(lambda: linen_init(module, jax.random.key(0), {"image": images}))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, (*stack, *leaf.shape)), leaf.dtype), shapes
    )


@pytest.mark.parametrize(
    ("window", "stride", "padding", "size"),
    [
        ((1, 1), 1, "SAME", (5, 5)),
        ((1, 1), 2, "VALID", (6, 7)),
        ((2, 2), 2, "SAME", (7, 8)),
        ((3, 3), 1, "SAME", (8, 8)),
        ((3, 3), 1, "VALID", (8, 8)),
        ((3, 3), 2, "SAME", (9, 8)),
        ((5, 2), 3, "VALID", (11, 7)),
        ((5, 2), 3, "SAME", (11, 7)),
        ((7, 7), 2, "SAME", (14, 13)),
    ],
)
def test_convolution_equals_flax_with_its_gradients(window, stride, padding, size):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(3, *size, 4)), jnp.float32)
    kernel = rng.normal(0, 1 / np.sqrt(4 * np.prod(window)), (*window, 4, 6))
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.linspace(-1, 1, 6)}

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradients(module, params, images):
        outputs, pull_back = jax.vjp(
            lambda params, images: module.apply({"params": params}, images), params, images
        )
        # Any cotangent; a random one tests the whole Jacobian.
        cotangent = jnp.sin(jnp.arange(outputs.size, dtype=jnp.float32))
        return outputs, pull_back(cotangent.reshape(outputs.shape))

    ours = Conv(6, window, stride, padding)
    theirs = nn.Conv(6, window, stride, padding, precision="highest")
    close(
        outputs_and_gradients(ours, params, images), outputs_and_gradients(theirs, params, images)
    )


def test_convolution_initializes_as_flax_does():
    ours, theirs = (
        jax.jit(module.init)(jax.random.key(5), jnp.zeros((1, 8, 8, 3)))["params"]
        for module in (Conv(16), nn.Conv(16, (3, 3)))
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    close(ours, theirs, 0)


def test_convolution_over_many_kernels_is_a_matrix_product():
    """No grouped convolution, which is what ``vmap`` makes of a native one."""
    images = jnp.ones((4, 2, 8, 8, 3))
    params = random_params(Conv(5), images[0], 4)

    def lowered(module):
        def loss(params, images):
            return (module.apply({"params": params}, images) ** 2).sum()

        return jax.jit(jax.vmap(jax.grad(loss))).lower(params, images).as_text("hlo")

    assert "convolution(" not in lowered(Conv(5))
    assert "convolution(" in lowered(nn.Conv(5, (3, 3)))


@pytest.mark.parametrize(
    ("shape", "padding", "message"),
    [((1, 4, 4, 1), "same", "SAME, VALID"), ((1, 2, 4, 1), "VALID", "3x3 window")],
)
def test_impossible_convolutions_are_refused(shape, padding, message):
    with pytest.raises(ValueError, match=message):
        convolve(jnp.zeros(shape), jnp.zeros((3, 3, 1, 1)), 1, padding)


@pytest.mark.parametrize("size", [(8, 8), (7, 6), (5, 9)])
def test_pooling_equals_flax_with_its_gradient(size):
    # A permutation has no ties, of which each implementation has its own idea.
    count = 2 * size[0] * size[1] * 3
    images = jax.random.permutation(jax.random.key(0), count).reshape(2, *size, 3) / count

    def pools(pool):
        return pool(images), jax.grad(lambda x: (pool(x) ** 2).sum())(images)

    close(pools(max_pool), pools(lambda x: nn.max_pool(x, (2, 2), (2, 2))), 0)


def test_mlp_computes_what_it_says():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 1), dtype=np.uint8)
    module = MLP((8, 7), 3, 0.5)
    params = random_params(module, images)
    assert sorted(leaves_by_path(params)) == [
        f"{layer}/{name}"
        for layer in ("head", "hidden_0", "hidden_1")
        for name in ("bias", "kernel")
    ]
    values = images.reshape(4, 30).astype(np.float64) / 255
    for layer in ("hidden_0", "hidden_1"):
        values = values @ np.asarray(params[layer]["kernel"]) + np.asarray(params[layer]["bias"])
        values = np.maximum(values, 0)
    values = values @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    apply_fn = linen_apply(module)
    close(apply_fn(params, {"image": images}, None), values)
    floats = {"image": (images / 255).astype(np.float32)}
    close(apply_fn(params, floats, None), values)


def test_cnn_equals_the_same_layers_of_flax():
    channels, dense, classes = (8, 12), 10, 5
    module = CNN(channels, dense, classes)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(3, 13, 9, 2)), jnp.float32)
    params = random_params(module, images)

    def expected(params, values):
        for index, width in enumerate(channels):
            convolution = nn.Conv(width, (3, 3))
            values = convolution.apply({"params": params[f"conv_{index}"]}, values)
            norm = nn.GroupNorm(8 if width == 8 else 4)
            values = nn.relu(norm.apply({"params": params[f"norm_{index}"]}, values))
            values = nn.max_pool(values, (2, 2), (2, 2))
        values = values.reshape(3, -1)
        values = nn.relu(nn.Dense(dense).apply({"params": params["dense"]}, values))
        return nn.Dense(classes).apply({"params": params["head"]}, values)

    apply_fn = linen_apply(module)
    actual = jax.jit(lambda params, images: apply_fn(params, {"image": images}, None))
    close(actual(params, images), jax.jit(expected)(params, images))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_configured_models_have_sites_in_all_hidden_layers(name):
    config = ModelConfig(name=name, hidden=(9, 8), channels=(6, 4), dense=7)
    images = np.zeros((2, 12, 12, 3), np.uint8)

    def shapes(dropout):
        module = make_model(config, 10, dropout)
        return jax.eval_shape(lambda: linen_init(module, jax.random.key(0), {"image": images}))

    columns = {site.path: site.columns for site in find_sites(shapes(0.3))}
    assert (
        columns
        == {
            "mlp": {"hidden_0/kernel": 9, "hidden_1/kernel": 8},
            "cnn": {"conv_0/kernel": 6, "conv_1/kernel": 4, "dense/kernel": 7},
        }[name]
    )
    # The server's dropout and the clients' may differ.
    assert shapes(0.3) == shapes(0.0)


@pytest.mark.parametrize("module", [MLP((16,), 4, 0.5), CNN((8,), 16, 4, 0.5)])
def test_stacked_clients_equal_single_ones(module):
    """Under ``vmap`` over parameters and keys, with gradients: nothing mixes clients."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(3, 2, 8, 8, 1)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    params = random_params(module, images[0], 3)
    apply_fn = linen_apply(module)

    def step(params, images, key):
        return jax.grad(lambda p: (apply_fn(p, {"image": images}, key) ** 2).sum())(params)

    stacked = jax.jit(jax.vmap(step))(params, images, keys)
    one = jax.jit(step)
    alone = [
        one(jax.tree.map(lambda leaf, k=k: leaf[k], params), images[k], keys[k]) for k in range(3)
    ]
    close(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))


@pytest.mark.parametrize("shape", [(2, 64), (2, 3, 8, 1)])
def test_images_that_a_cnn_cannot_take_are_refused(shape):
    with pytest.raises(ValueError, match="4x4 pixels or more"):
        linen_init(CNN((4, 4), 8, 3), jax.random.key(0), {"image": jnp.zeros(shape)})
