"""Layouts of mask sites: every entry of a kernel is looked up on its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_jax.protocol.sites import (
    MaskSite,
)


def make_site(roles, shape, bias=True):
    axes = [
        tuple(i for i, r in enumerate(roles) if r == role) for role in ("layer", "input", "column")
    ]
    return MaskSite("w/kernel", tuple(shape), *axes, "w/bias" if bias else None)


def flat_index(site, axes, index):
    shape = [site.shape[axis] for axis in axes]
    return int(np.ravel_multi_index([index[axis] for axis in axes], shape)) if axes else 0


LAYOUTS = [
    (["input", "column"], (3, 4)),
    (["column", "input"], (3, 4)),
    (["input", "input", "input", "column"], (2, 3, 2, 4)),
    (["input", "column", "column"], (4, 2, 3)),
    (["input", "input", "column"], (2, 3, 4)),
    (["layer", "input", "column"], (2, 3, 4)),
    (["column", "layer", "input", "column", "layer"], (2, 3, 2, 4, 2)),
]
roles_and_shapes = (
    st.lists(
        st.tuples(st.sampled_from(["layer", "input", "column"]), st.integers(1, 3)), max_size=3
    )
    .flatmap(lambda more: st.permutations([("input", 3), ("column", 2), *more]))
    .map(lambda axes: ([role for role, _ in axes], tuple(size for _, size in axes)))
)


def check_layout(roles, shape):
    site = make_site(roles, shape)
    kernel = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrices = site.to_matrices(kernel)
    assert matrices.shape == (site.layers, site.fan_in, site.columns)
    bias = np.arange(np.prod(site.bias_shape), dtype=np.float32).reshape(site.bias_shape)
    columns = site.from_bias(bias)
    assert columns.shape == (site.layers, site.columns)
    factors = np.asarray(site.to_kernel(columns))
    axes = site.layer_axes, site.input_axes, site.column_axes
    for index in np.ndindex(*shape):
        at_layer, at_input, at_column = (flat_index(site, each, index) for each in axes)
        assert matrices[at_layer, at_input, at_column] == kernel[index]
        at_bias = tuple(i for axis, i in enumerate(index) if axis not in site.input_axes)
        assert columns[at_layer, at_column] == bias[at_bias]
        at_factor = tuple(0 if axis in site.input_axes else i for axis, i in enumerate(index))
        assert factors[at_factor] == bias[at_bias]
    np.testing.assert_array_equal(site.from_matrices(matrices), kernel)
    np.testing.assert_array_equal(site.to_bias(columns), bias)


@pytest.mark.parametrize(("roles", "shape"), LAYOUTS)
def test_layouts(roles, shape):
    check_layout(roles, shape)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(roles_and_shapes)
def test_layouts_of_any_roles(roles_and_shape):
    check_layout(*roles_and_shape)


def test_matrices_compute_what_the_layers_compute():
    rng = np.random.default_rng(0)
    query = make_site(["input", "column", "column"], (6, 4, 3))
    out = make_site(["input", "input", "column"], (4, 3, 6))
    convolution = make_site(["input", "input", "column"], (2, 5, 4))
    kernel, x = rng.normal(size=query.shape), rng.normal(size=(2, 6))
    expected = np.einsum("bi,ihd->bhd", x, kernel).reshape(2, 12)
    np.testing.assert_allclose(x @ query.to_matrices(kernel)[0], expected, rtol=1e-12)
    kernel, x = rng.normal(size=out.shape), rng.normal(size=(2, 4, 3))
    expected = np.einsum("bhd,hdo->bo", x, kernel)
    np.testing.assert_allclose(x.reshape(2, 12) @ out.to_matrices(kernel)[0], expected, rtol=1e-12)
    kernel, x = rng.normal(size=convolution.shape), rng.normal(size=(7, 5))
    patches = np.stack([x[i : i + 2].ravel() for i in range(6)])
    expected = [[np.sum(x[i : i + 2] * kernel[..., c]) for c in range(4)] for i in range(6)]
    np.testing.assert_allclose(patches @ convolution.to_matrices(kernel)[0], expected, rtol=1e-12)


@pytest.mark.parametrize(("roles", "shape"), LAYOUTS)
def test_layouts_take_jax_arrays(roles, shape):
    site = make_site(roles, shape)
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    matrices = site.to_matrices(jnp.asarray(kernel))
    np.testing.assert_array_equal(matrices, site.to_matrices(kernel))
    np.testing.assert_array_equal(site.from_matrices(matrices), kernel)
