"""A JAX whose Pallas has no Triton backend computes everything by plain JAX, and says so once."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from fedqsn_jax.models.kernels import gpu_blocks
from fedqsn_jax.models.kernels.convolution import convolve_relu_pool
from fedqsn_jax.models.language.encoder import EncoderConfig
from fedqsn_jax.models.language.families import make_language_model

SIZES = ("roberta", 20, 64, 1, 2, 128)


@pytest.fixture
def without_triton(monkeypatch):
    """The package, imported anew by a JAX that has no such backend."""
    for name in [name for name in sys.modules if name.split(".")[0] == "fedqsn_jax"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pallas, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    import fedqsn_jax.models.kernels.convolution
    import fedqsn_jax.models.kernels.gpu_blocks
    import fedqsn_jax.models.language.families

    yield fedqsn_jax.models
    for name in [name for name in sys.modules if name.split(".")[0] == "fedqsn_jax"]:
        del sys.modules[name]


def test_all_models_compute_the_same(without_triton):
    batch = {"tokens": jnp.full((2, 16), 5, jnp.int32)}
    config = EncoderConfig(*SIZES, pad_token_id=1, classes=3)
    model = make_language_model(config)
    params = model.init(jax.random.key(0))
    families = without_triton.language.families
    other = families.FAMILIES["roberta"](*SIZES, pad_token_id=1, classes=3)
    np.testing.assert_array_equal(
        families.make_language_model(other).apply_fn(params, batch, None),
        model.apply_fn(params, batch, None),
    )
    images, kernel = jnp.ones((1, 8, 8, 16)), jnp.ones((3, 3, 16, 16))
    arrays = images, kernel, jnp.zeros(16)
    np.testing.assert_array_equal(
        without_triton.kernels.convolution.convolve_relu_pool(*arrays), convolve_relu_pool(*arrays)
    )


def test_on_a_gpu_no_kernel_is_used_and_a_line_says_so(without_triton, monkeypatch):
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = SimpleNamespace(client=client, compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    blocks, convolution = without_triton.kernels.gpu_blocks, without_triton.kernels.convolution
    assert not blocks.applies()
    assert blocks.knows_bfloat16()
    (line,) = blocks.missing_note()
    assert "no Triton backend" in line
    assert "\n" not in line
    shapes = (1, 8, 8, 16), (3, 3, 16, 16), (16,)
    program = jax.make_jaxpr(convolution.convolve_relu_pool)(*map(jnp.ones, shapes))
    assert "pallas_call" not in str(program)
    # With it they are used, and nothing is said.
    assert gpu_blocks.applies()
    assert gpu_blocks.missing_note() == ()


def test_elsewhere_nothing_is_said(without_triton, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert without_triton.kernels.gpu_blocks.missing_note() == ()
