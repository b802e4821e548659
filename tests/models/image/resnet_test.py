"""ResNet-18: its size, its layers against Flax's own, its mask sites."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedqsn_jax.config.schema import ModelConfig
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.models.functional import linen_apply, linen_init
from fedqsn_jax.models.image.resnet import ResNet18
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.protocol.sites import find_sites

WIDTH, CLASSES = 4, 5


def shapes(module, size=32):
    images = np.zeros((1, size, size, 3), np.uint8)
    return jax.eval_shape(lambda: linen_init(module, jax.random.key(0), {"image": images}))


def random_params(module, *stack):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, (*stack, *leaf.shape)), leaf.dtype),
        shapes(module),
    )


def close(actual, expected, tolerance=2e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=tolerance * float(np.abs(e).max())),
        actual,
        expected,
    )


def native(params, images, stem):
    """The network by `flax.linen.Conv` and the paper's table, on parameters of ours."""

    def conv(values, name, window, channels, stride=1):
        module = nn.Conv(channels, (window, window), stride, use_bias=False, precision="highest")
        return module.apply({"params": name}, values)

    def norm(values, name):
        return nn.GroupNorm(math.gcd(32, values.shape[-1])).apply({"params": name}, values)

    window, stride = (3, 1) if stem == "cifar" else (7, 2)
    values = images.astype(jnp.float32) / 255
    values = conv(values, params["stem"], window, WIDTH, stride)
    values = nn.relu(norm(values, params["stem_norm"]))
    if stem == "imagenet":
        values = nn.max_pool(values, (3, 3), (2, 2), "SAME")
    for stage in range(4):
        for index in range(2):
            block, channels = params[f"block_{stage}_{index}"], WIDTH * 2**stage
            stride = 2 if stage and not index else 1
            shortcut = values
            if stride == 2:
                shortcut = conv(values, block["projection"], 1, channels, 2)
                shortcut = norm(shortcut, block["projection_norm"])
            values = nn.relu(
                norm(conv(values, block["conv_0"], 3, channels, stride), block["norm_0"])
            )
            values = norm(conv(values, block["conv_1"], 3, channels), block["norm_1"])
            values = nn.relu(values + shortcut)
    return values.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.mark.parametrize(
    ("classes", "stem", "size", "count"),
    # As counted for the usual implementations, whose batch norms have as many parameters.
    [(10, "cifar", 32, 11_173_962), (1000, "imagenet", 224, 11_689_512)],
)
def test_size_is_the_known_one(classes, stem, size, count):
    leaves = jax.tree.leaves(shapes(ResNet18(classes, stem=stem), size))
    assert sum(leaf.size for leaf in leaves) == count


def outputs_and_gradient(function):
    def loss(params, images):
        outputs = function(params, images)
        return (outputs**2).sum(), outputs

    return jax.grad(loss, has_aux=True)


def own_and_native(stem):
    apply_fn = linen_apply(ResNet18(CLASSES, WIDTH, stem))
    native_stem = functools.partial(native, stem=stem)
    own = outputs_and_gradient(lambda params, images: apply_fn(params, {"image": images}, None))
    return own, jax.jit(outputs_and_gradient(native_stem))


def test_network_equals_flaxs_own_layers_with_gradients():
    params = random_params(ResNet18(CLASSES, WIDTH, "imagenet"))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 27, 3), dtype=np.uint8)
    own, expected = own_and_native("imagenet")
    close(jax.jit(own)(params, images), expected(params, images), 1e-4)


def test_stacked_clients_equal_flaxs_own_layers_on_each():
    params = random_params(ResNet18(CLASSES, WIDTH), 2)
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 8, 8, 3), dtype=np.uint8)
    own, expected = own_and_native("cifar")
    each = [expected(jax.tree.map(lambda a, k=k: a[k], params), images[k]) for k in (0, 1)]
    stacked = jax.jit(jax.vmap(own))(params, images)
    close(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), 1e-4)


def test_every_convolution_is_a_site_and_the_head_is_not():
    config = ModelConfig(name="resnet18", width=WIDTH)
    tree = shapes(make_model(config, CLASSES, 0.3))
    kernels = {path: leaf for path, leaf in leaves_by_path(tree).items() if path.endswith("kernel")}
    columns = {site.path: site.columns for site in find_sites(tree)}
    assert len(columns) == 20
    assert columns == {p: k.shape[-1] for p, k in kernels.items() if p != "head/kernel"}


@pytest.mark.parametrize(
    ("stem", "shape", "message"),
    [("small", (1, 8, 8, 3), "cifar, imagenet"), ("cifar", (1, 64), "height, width, channels")],
)
def test_impossible_networks_are_refused(stem, shape, message):
    module = ResNet18(CLASSES, WIDTH, stem)
    with pytest.raises(ValueError, match=message):
        linen_init(module, jax.random.key(0), {"image": jnp.zeros(shape)})
