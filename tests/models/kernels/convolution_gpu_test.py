"""The GPU's convolution kernels in Pallas's interpreter, against native convolutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.models.kernels import convolution_gpu, convolution_thin
from fedqsn_jax.models.kernels.convolution import convolve, convolve_relu, convolve_relu_pool

CLIENTS, ROWS = 2, 3
HIGHEST = jax.lax.Precision.HIGHEST
# Image size, padding, input and output channels: one block and several, even and odd sizes.
CASES = [((8, 6), 0, 16, 32), ((5, 7), 1, 64, 16)]


def close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=tolerance * float(np.abs(e).max())),
        actual,
        expected,
    )


def arrays(size, inputs, outputs):
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(0, scale, (CLIENTS, *shape)), jnp.float32)
        for scale, shape in (
            (1, (ROWS, *size, inputs)),
            (0.1, (3, 3, inputs, outputs)),
            (0.3, (outputs,)),
        )
    )


def native(images, kernel, padding):
    pads = ((padding, padding), (padding, padding))
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), pads, dimension_numbers=layout, precision=HIGHEST
    )


def value_and_gradients(function, *operands):
    """Of clients side by side, with a cotangent that differs everywhere."""

    def of_one(*operands):
        outputs, pull_back = jax.vjp(function, *operands)
        waves = jnp.sin(jnp.arange(outputs.size, dtype=jnp.float32)).reshape(outputs.shape)
        return outputs, pull_back(waves.astype(outputs.dtype))

    return jax.jit(jax.vmap(of_one))(*operands)


@pytest.mark.parametrize(("size", "padding", "inputs", "outputs"), CASES)
def test_convolution_and_gradients_equal_the_native_ones(size, padding, inputs, outputs):
    images, kernel, _ = arrays(size, inputs, outputs)
    out_size = size[0] + 2 * padding - 2, size[1] + 2 * padding - 2

    def ours(images, kernel):
        before = padding, padding
        return convolution_gpu.convolve(images, kernel, before, out_size, HIGHEST, True)

    expected = value_and_gradients(functools.partial(native, padding=padding), images, kernel)
    close(value_and_gradients(ours, images, kernel), expected)


@pytest.mark.parametrize(("size", "padding", "inputs", "outputs"), CASES)
def test_fused_pooling_and_gradients_equal_the_native_ones(size, padding, inputs, outputs):
    operands = arrays(size, inputs, outputs)
    out_size = size[0] + 2 * padding - 2, size[1] + 2 * padding - 2

    def ours(images, kernel, bias):
        before = padding, padding
        return convolution_gpu.convolve_relu_pool(
            images, kernel, bias, before, out_size, HIGHEST, True
        )

    def expected(images, kernel, bias):
        values = jax.nn.relu(native(images, kernel, padding) + bias[None, None, None])
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(values, -jnp.inf, jax.lax.max, window, window, "VALID")

    close(value_and_gradients(ours, *operands), value_and_gradients(expected, *operands))


@pytest.mark.parametrize(("size", "padding", "outputs"), [((8, 6), 0, 16), ((5, 7), 1, 32)])
def test_thin_images_and_gradients_equal_the_native_ones(size, padding, outputs):
    operands = arrays(size, 1, outputs)
    out_size = size[0] + 2 * padding - 2, size[1] + 2 * padding - 2

    def ours(images, kernel, bias):
        before = padding, padding
        return convolution_thin.convolve_relu(images, kernel, bias, before, out_size, True)

    def expected(images, kernel, bias):
        return jax.nn.relu(native(images, kernel, padding) + bias[None, None, None])

    close(value_and_gradients(ours, *operands), value_and_gradients(expected, *operands))


def test_bfloat16_is_accumulated_in_float32():
    images, kernel, _ = (array.astype(jnp.bfloat16) for array in arrays((6, 6), 16, 16))

    def ours(images, kernel):
        return convolution_gpu.convolve(images, kernel, (0, 0), (4, 4), HIGHEST, True)

    actual = value_and_gradients(ours, images, kernel)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(actual))
    wide = (array.astype(jnp.float32) for array in (images, kernel))
    expected = value_and_gradients(functools.partial(native, padding=0), *wide)
    # One rounding to 8 bits, and that of the cotangent.
    floats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), actual)
    close(floats, expected, 2**-8)


@pytest.mark.parametrize(
    ("asked", "dtype", "expected"),
    [
        ("highest", jnp.float32, "HIGHEST"),
        ("float32", jnp.float32, "HIGHEST"),
        ("highest", jnp.bfloat16, "DEFAULT"),
        ("tensorfloat32", jnp.float32, "DEFAULT"),
        ("default", jnp.float32, "DEFAULT"),
        (None, jnp.float32, "DEFAULT"),
    ],
)
def test_precision_follows_jaxs_setting(asked, dtype, expected):
    with jax.default_matmul_precision(asked):
        assert convolution_gpu.current_precision(dtype).name == expected


@pytest.mark.parametrize(
    ("shape", "stride", "fits"),
    [
        ((3, 3, 32, 64), 1, True),
        ((3, 3, 48, 16), 1, True),
        ((3, 3, 1, 32), 1, False),
        ((3, 3, 32, 24), 1, False),
        ((3, 3, 32, 64), 2, False),
        ((1, 1, 32, 64), 1, False),
        ((7, 7, 32, 64), 1, False),
    ],
)
def test_only_what_the_kernels_can_do_goes_to_them(shape, stride, fits):
    assert convolution_gpu.fits(shape, stride) is fits


@pytest.mark.parametrize("function", [convolve, convolve_relu_pool])
def test_the_device_decides_which_convolution_is_compiled(function):
    images, kernel, bias = (array[0] for array in arrays((6, 6), 16, 16))
    operands = (images, kernel) if function is convolve else (images, kernel, bias)

    def loss(*operands):
        return (function(*operands) ** 2).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*operands)
    branches = [
        [str(branch).count("pallas_call") for branch in equation.params["branches"]]
        for equation in traced.jaxpr.eqns
        if equation.params.get("branches_platforms") == (("cuda",), None)
    ]
    # Forward there is one kernel, backward there are two; other devices have none.
    assert branches == [[1, 0], [2, 0]]
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_fused_pooling_equals_its_parts_on_this_device():
    images, kernel, bias = (array[0] for array in arrays((6, 7), 16, 16))
    actual = convolve_relu_pool(images, kernel, bias, 1, "VALID")
    values = np.maximum(np.asarray(native(images, kernel, 0)) + np.asarray(bias), 0)
    close(actual, values[:, :4, :4].reshape(ROWS, 2, 2, 2, 2, 16).max(axis=(2, 4)))


@pytest.mark.parametrize(
    ("shape", "stride", "fits"),
    [
        ((3, 3, 1, 32), 1, True),
        ((3, 3, 1, 24), 1, False),
        ((3, 3, 1, 128), 1, False),
        ((3, 3, 3, 32), 1, False),
        ((3, 3, 1, 32), 2, False),
        ((5, 5, 1, 32), 1, False),
    ],
)
def test_only_thin_images_go_to_their_kernels(shape, stride, fits):
    assert convolution_thin.fits(shape, stride) is fits


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_thin_convolutions_are_compiled_for_the_device(padding):
    operands = images, kernel, bias = [array[0] for array in arrays((6, 5), 1, 16)]
    traced = jax.jit(functools.partial(convolve_relu, padding=padding)).trace(*operands)
    assert str(traced.jaxpr).count("pallas_call") == 1
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    width = 1 if padding == "SAME" else 0
    expected = np.maximum(np.asarray(native(images, kernel, width)) + np.asarray(bias), 0)
    close(convolve_relu(*operands, padding=padding), expected)
