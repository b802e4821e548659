"""Mixed precision: bfloat16 inside the model, float32 everywhere else."""

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.tasks import classification
from fedqsn_jax.models.functional import in_compute_dtype
from fedqsn_jax.models.image.mlp import MLP


def loss_of(apply_fn, data):
    def loss(params):
        valid = jnp.ones(data.examples["label"].shape, bool)
        return classification().loss(apply_fn(params, data.examples, None), data.examples, valid)

    return loss


def product_dtypes(jaxpr):
    return [
        str(v.aval.dtype) for e in jaxpr.eqns if e.primitive.name == "dot_general" for v in e.invars
    ]


def test_products_are_narrow_and_gradients_are_not(model, data):
    narrow = loss_of(in_compute_dtype(model.apply_fn, "bfloat16"), data)
    traced = jax.make_jaxpr(jax.grad(narrow))(model.params)
    # Three layers: each has a product forwards and two backwards, but the first one.
    assert product_dtypes(traced.jaxpr) == ["bfloat16"] * 16
    value, gradient = jax.value_and_grad(narrow)(model.params)
    exact, expected = jax.value_and_grad(loss_of(model.apply_fn, data))(model.params)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=0.02)
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert got.dtype == jnp.float32
        assert jnp.linalg.norm(got - wanted) < 0.05 * jnp.linalg.norm(wanted)


def test_float32_is_the_model_itself(model):
    assert in_compute_dtype(model.apply_fn, "float32") is model.apply_fn


def test_bytes_stay_narrow():
    module = MLP((4,), 3)
    images = jnp.arange(6, dtype=jnp.uint8).reshape(2, 3)
    params = module.init(jax.random.key(0), images)["params"]
    narrow = in_compute_dtype(lambda p, b, key: module.apply({"params": p}, b["image"]), "bfloat16")
    traced = jax.make_jaxpr(lambda p: narrow(p, {"image": images}, None))(params)
    assert set(product_dtypes(traced.jaxpr)) == {"bfloat16"}
