"""Cross-entropy in blocks of the vocabulary, against that of all logits at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedqsn_jax.generation.language_tasks import conditional_generation
from fedqsn_jax.models.language import families, output_layer
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.llama import LlamaConfig
from fedqsn_jax.models.language.output_layer import Unprojected, token_losses

VOCABULARY, WIDTH = 25, 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Four blocks of seven, the last of which overlaps the third."""
    monkeypatch.setattr(output_layer, "_BLOCK", 7)


def outputs_of(axis, dtype=jnp.float32, cap=None):
    keys = jax.random.split(jax.random.key(0))
    hidden = jax.random.normal(keys[0], (2, 5, WIDTH), dtype)
    kernel = 2 * jax.random.normal(keys[1], (WIDTH, VOCABULARY))
    return Unprojected(hidden, kernel.T if axis else kernel, axis, cap)


def plain_losses(outputs, tokens, smoothing):
    """Of the one-hot target mixed with the uniform distribution, by optax."""
    one_hot = jax.nn.one_hot(tokens, VOCABULARY)
    wanted = (1 - smoothing) * one_hot + smoothing / VOCABULARY
    return optax.softmax_cross_entropy(outputs.logits(), wanted)


@pytest.mark.parametrize(
    ("axis", "cap", "smoothing"), [(0, None, 0.0), (1, None, 0.1), (0, 3.0, 0.1), (1, 3.0, 0.0)]
)
def test_values_and_gradients_are_those_of_all_logits(axis, cap, smoothing):
    outputs = outputs_of(axis, cap=cap)
    tokens = jnp.asarray([[0, 6, 7, 20, 24], [13, 14, 18, 21, 3]])
    counts = jnp.asarray([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])

    def total(losses):
        def of(hidden, kernel):
            made = dataclasses.replace(outputs, hidden=hidden, kernel=kernel)
            each = losses(made, tokens, smoothing)
            return jnp.where(counts == 1, each, 0).sum(), each

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))

    (_, ours), our_slopes = total(token_losses)(outputs.hidden, outputs.kernel)
    (_, plain), slopes = total(plain_losses)(outputs.hidden, outputs.kernel)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    for our_slope, slope in zip(our_slopes, slopes, strict=True):
        np.testing.assert_allclose(our_slope, slope, rtol=1e-4, atol=1e-5)
        assert np.asarray(slope).any()
    # What is ignored has no gradient, whatever its label.
    assert not np.asarray(our_slopes[0])[1, 1].any()


def test_in_bfloat16_and_with_labels_outside_of_the_vocabulary():
    outputs, tokens = outputs_of(0, jnp.bfloat16), jnp.asarray([[1, -100, 2, 3, 99], [4] * 5])
    counts = (tokens >= 0) & (tokens < VOCABULARY)

    def loss(kernel, hidden):
        made = dataclasses.replace(outputs, hidden=hidden, kernel=kernel)
        return jnp.where(counts, token_losses(made, tokens), 0).sum()

    def plain(kernel, hidden):
        made = dataclasses.replace(outputs, hidden=hidden, kernel=kernel)
        return jnp.where(counts, plain_losses(made, jnp.where(counts, tokens, 0), 0.0), 0).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(each, argnums=(0, 1)))(outputs.kernel, outputs.hidden)
        for each in (loss, plain)
    )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for our_slope, slope in zip(ours[1], theirs[1], strict=True):
        assert our_slope.dtype == slope.dtype
        difference = our_slope.astype(jnp.float32) - slope.astype(jnp.float32)
        assert jnp.linalg.norm(difference) < 0.01 * jnp.linalg.norm(slope.astype(jnp.float32))


def arrays_of(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda it: hasattr(it, "eqns") or hasattr(it, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


@pytest.mark.parametrize("tied", [True, False])
def test_training_holds_no_logits_of_the_whole_vocabulary(monkeypatch, tied):
    monkeypatch.setattr(families, "LARGE_VOCABULARY", VOCABULARY)
    config = LlamaConfig("llama", VOCABULARY, 8, 1, 2, 2, 4, 8, tied=tied)
    model, task = make_language_model(config), conditional_generation(0.1)
    tokens = jnp.arange(10).reshape(2, 5)
    batch = {"tokens": tokens, "mask": tokens >= 0, "loss_mask": tokens >= 0}
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(apply_fn):
        return lambda params: task.loss(apply_fn(params, batch, None), batch, jnp.ones(2, bool))

    shapes = {
        name: set(arrays_of(jax.make_jaxpr(jax.grad(loss(apply_fn)))(params).jaxpr))
        for name, apply_fn in (("plain", model.apply_fn), ("ours", model.trained_fn))
    }
    assert (2, 5, VOCABULARY) in shapes["plain"]
    assert not {(2, 5, VOCABULARY), (10, VOCABULARY)} & shapes["ours"]
    values = model.init(jax.random.key(0))
    np.testing.assert_allclose(
        loss(model.trained_fn)(values), loss(model.apply_fn)(values), rtol=1e-5
    )
