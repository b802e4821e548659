"""Language models: settings of execution change nothing, caches, dropout, attention, positions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_cases import CONFIGS, VOCAB, batch_of, jit, random_params

from fedqsn_jax.models.kernels.dropout import drop
from fedqsn_jax.models.language.attention import Weighting, attend
from fedqsn_jax.models.language.cache import attendable, empty_cache, last_real, positions_of
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.relative_positions import relative_buckets
from fedqsn_jax.models.language.rotary_positions import (
    RopeScaling,
    rope_frequencies,
    rotate,
    rotation_of,
)
from fedqsn_jax.models.language.transformer import Execution


def close(actual, expected, tolerance=1e-5):
    """Compares trees leaf by leaf, relative to each leaf's largest entry."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=tolerance * max(1, np.abs(e).max())),
        actual,
        expected,
    )


def logits_of(name, execution=None, dropout=None, key=None):
    """``(params, batch) -> logits``."""
    apply_fn = make_language_model(CONFIGS[name], execution, dropout).apply_fn
    return functools.partial(apply_fn, key=key)


def gradient_of(name, execution=None):
    """``(params, batch) -> gradient`` of a loss that every logit enters with its own weight."""
    apply_fn = logits_of(name, execution)

    def loss(params, batch):
        logits = apply_fn(params, batch)
        return (logits * jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)).sum()

    return jax.grad(loss)


@functools.cache
def plain(function, name):
    """What a function of a model, `logits_of` or `gradient_of`, gives with default settings."""
    return jit(function(name))(random_params(CONFIGS[name]), batch_of())


@pytest.mark.parametrize(
    ("function", "name"),
    [(gradient_of, "bert"), *((logits_of, name) for name in ("gpt2", "llama", "t5"))],
)
def test_stacked_parameters_compute_what_single_ones_do(function, name):
    config, batch = CONFIGS[name], batch_of()
    both = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), random_params(config), random_params(config, seed=1)
    )
    mapped = jit(jax.vmap(function(name), in_axes=(0, None)))(both, batch)
    close(jax.tree.map(lambda leaf: leaf[0], mapped), plain(function, name))


@pytest.mark.parametrize(
    ("function", "name", "execution"),
    [
        (gradient_of, "bert", Execution(unroll=8)),
        (gradient_of, "bert", Execution(remat=True)),
        (logits_of, "gpt2", Execution(unroll=2)),
        (logits_of, "t5", Execution(unroll=2)),
    ],
)
def test_unrolled_and_rematerialized_layers_are_the_same(function, name, execution):
    again = jit(function(name, execution))(random_params(CONFIGS[name]), batch_of())
    close(again, plain(function, name))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_bfloat16_is_close_and_keeps_parameters_float32(name):
    params, exact = random_params(CONFIGS[name]), plain(logits_of, name)
    execution = Execution(dtype="bfloat16")
    logits = jit(logits_of(name, execution))(params, batch_of())
    assert logits.dtype == jnp.float32
    assert 0 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.05
    model = make_language_model(CONFIGS[name], execution)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dropout_acts_with_a_key(name):
    params, (key, other) = random_params(CONFIGS[name]), jax.random.split(jax.random.key(0))
    dropping = jit(make_language_model(CONFIGS[name], dropout=0.3).apply_fn)
    drawn = dropping(params, batch_of(), key)
    np.testing.assert_array_equal(drawn, dropping(params, batch_of(), key))
    assert np.abs(drawn - dropping(params, batch_of(), other)).max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_key_or_a_rate_dropout_is_not_even_there(name):
    def program(function):
        return str(jax.make_jaxpr(function)(random_params(CONFIGS[name]), batch_of()))

    without = program(logits_of(name))
    # A constant of the hash that decides what is dropped.
    hashed = str(0x7FEB352D)
    assert hashed not in without
    assert program(logits_of(name, dropout=0.3)) == without
    assert hashed not in program(logits_of(name, dropout=0.0, key=jax.random.key(0)))
    assert hashed in program(logits_of(name, dropout=0.3, key=jax.random.key(0)))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_steps_with_a_cache_equal_the_whole_sequence(name):
    """Rows have padding on either side, and are repeated and reordered on the way."""
    config, batch = CONFIGS[name], batch_of()
    params = random_params(config)
    model = make_language_model(config)
    new = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (4, 3)), jnp.int32)
    rows = jnp.asarray([2, 0, 0, 1], jnp.int32)

    @jit
    def stepwise(params, batch):
        def step(cache, tokens):
            return model.decoder.step(params, tokens, cache)[::-1]

        first, cache = model.decoder.prefill(params, batch, 4)
        _, others = jax.lax.scan(step, model.decoder.take_rows(cache, rows), new.T)
        return jnp.concatenate([first[rows][:, None], others.swapaxes(0, 1)], axis=1)

    @jit
    def whole(params, batch):
        batch = {key: array[rows] for key, array in batch.items()}
        if name == "t5":
            batch["target_tokens"] = jnp.pad(new, ((0, 0), (0, 1)))
            return model.apply_fn(params, batch, None)
        length = batch["tokens"].shape[1]
        batch["tokens"] = jnp.concatenate([batch["tokens"], new], axis=1)
        batch["mask"] = jnp.pad(batch["mask"], ((0, 0), (0, 3)), constant_values=True)
        logits = model.apply_fn(params, batch, None)
        last = length - 1 - jnp.argmax(batch["mask"][:, length - 1 :: -1], axis=1)
        first = jnp.take_along_axis(logits, last.reshape(-1, 1, 1), axis=1)
        return jnp.concatenate([first, logits[:, length:]], axis=1)

    close(stepwise(params, batch), whole(params, batch))


def test_a_model_without_positions_for_a_sequence_refuses_it():
    batch = {"tokens": jnp.zeros((1, 16), jnp.int32)}
    for name in ("bert", "gpt2", "llama"):
        shapes = jax.eval_shape(make_language_model(CONFIGS[name]).init, jax.random.key(0))
        jax.eval_shape(make_language_model(CONFIGS[name]).apply_fn, shapes, batch, None)
    shapes = jax.eval_shape(make_language_model(CONFIGS["roberta"]).init, jax.random.key(0))
    with pytest.raises(ValueError, match="sequences of 16 tokens: the model has 14 positions"):
        jax.eval_shape(make_language_model(CONFIGS["roberta"]).apply_fn, shapes, batch, None)
    model = make_language_model(CONFIGS["gpt2"])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="sequences of 17 tokens: the model has 16 positions"):
        jax.eval_shape(lambda params: model.decoder.prefill(params, batch, 1), shapes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"attention": "flash"}, "auto, xla, cudnn"),
        ({"attention": "cudnn"}, "'cudnn' with dtype = 'float32': allowed is bfloat16"),
        ({"unroll": 0}, "unroll = 0: allowed is 1 or more"),
    ],
)
def test_wrong_execution_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Execution(**settings)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="this device has it")
def test_flash_attention_on_another_device_is_refused():
    execution = Execution("bfloat16", "cudnn")
    with pytest.raises(ValueError, match="attention = 'cudnn' needs a GPU; this is a cpu"):
        jax.eval_shape(logits_of("bert", execution), random_params(CONFIGS["bert"]), batch_of())


# Attention, against the formula in NumPy.


def attention_by_hand(query, key, value, mask, bias, scale):
    rows, queries, heads, _ = query.shape
    result = np.zeros(query.shape)
    for row, head, index in np.ndindex(rows, heads, queries):
        shared = head // (heads // key.shape[2])
        products = scale * key[row, :, shared] @ query[row, index, head] + bias[0, head, index]
        products = np.where(mask[row, 0, index], products, -np.inf)
        weights = np.exp(products - products.max())
        result[row, index, head] = weights / weights.sum() @ value[row, :, shared]
    return result


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_what_the_formula_says(dropping, causal):
    """Dropout's own implementation at rate 0 too."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 5, 2, 3)).astype(np.float32)
    bias = rng.normal(size=(1, 4, 5, 5)).astype(np.float32)
    mask = rng.random((2, 1, 5, 5)) < 0.7
    mask |= np.eye(5, dtype=bool)
    weighting = Weighting(0.7, causal, jax.random.key(0) if dropping else None)
    arrays = map(jnp.asarray, (query, key, value, mask, bias))
    actual = attend(*arrays, weighting=weighting, attention="auto")
    seen = mask & np.tril(np.ones((5, 5), bool)) if causal else mask
    expected = attention_by_hand(query, key, value, seen, bias, 0.7)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attention_of_cudnn_equals_that_of_xla(causal, kv_heads):
    """With its gradients, with padding on either side, mapped over clients and not."""
    rng = np.random.default_rng(0)

    def normal(heads):
        return jnp.asarray(rng.normal(size=(2, 3, 16, heads, 16)), jnp.bfloat16)

    arrays = normal(4), normal(kv_heads), normal(kv_heads)
    mask = np.ones((2, 3, 1, 1, 16), bool)
    mask[:, 1, ..., -5:] = False
    mask[:, 2, ..., :3] = False
    # Queries at padding see nothing that counts.
    weights = jnp.asarray(mask.reshape(2, 3, 16, 1, 1) * rng.normal(size=(2, 3, 16, 4, 16)))

    def loss(arrays, mask, weights, attention):
        attended = attend(*arrays, mask, None, Weighting(0.3, causal), attention)
        return (attended.astype(jnp.float32) * weights).sum()

    def gradients(attention):
        one = functools.partial(jax.value_and_grad(loss), attention=attention)
        first = jax.tree.map(lambda array: array[0], (arrays, mask, weights))
        return jax.jit(one)(*first), jax.jit(jax.vmap(one))(arrays, mask, weights)

    def as_float32(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)

    close(as_float32(gradients("cudnn")), as_float32(gradients("xla")), 0.03)


def test_a_row_that_sees_nothing_is_finite():
    ones = jnp.ones((1, 2, 2, 3))
    for key in (None, jax.random.key(0)):
        mask = jnp.zeros((1, 1, 1, 2), bool)
        attended = attend(ones, ones, ones, mask, None, Weighting(1.0, True, key, 0.5), "xla")
        assert np.isfinite(attended).all()


@pytest.mark.parametrize("size", [(1000, 100), (333, 111)])
def test_dropped_entries_have_the_right_share_and_mean(size):
    dropped = np.asarray(drop(jax.random.key(0), jnp.ones(size), 0.1))
    kept = 1 - round(0.1 * 2**32) / 2**32
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / kept)}
    spread = math.sqrt(kept * (1 - kept) / dropped.size)
    assert abs((dropped > 0).mean() - kept) < 4 * spread
    # What becomes of neighbours is unrelated.
    pairs = dropped.reshape(-1)[: dropped.size // 2 * 2].reshape(-1, 2) > 0
    assert abs((pairs[:, 0] & pairs[:, 1]).mean() - kept**2) < 4 * spread
    assert drop(jax.random.key(0), jnp.ones(3, jnp.bfloat16), 0.5).dtype == jnp.bfloat16
    # Nor does padding change it.
    smaller = drop(jax.random.key(0), jnp.ones((7, 5)), 0.1)
    np.testing.assert_array_equal(dropped[:7, :5], smaller)


# Positions.


def test_rotary_frequencies_of_llama_3():
    """The three regimes, by the wavelengths that arXiv 2407.21783's configuration names."""
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    plain_ones = rope_frequencies(128, 500000.0)
    scaled = rope_frequencies(128, 500000.0, scaling)
    assert len(scaled) == 64
    for before, after in zip(plain_ones, scaled, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            assert after == pytest.approx(before)
        elif wavelength > 8192:
            assert after == pytest.approx(before / 8)
        else:
            assert before / 8 < after < before
    assert plain_ones[0] == 1
    assert plain_ones[-1] == pytest.approx(500000 ** (-126 / 128))


def test_rotation_depends_on_distance_only():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    frequencies = rope_frequencies(8, 100.0)

    def product(at_query, at_key):
        turned = (
            rotate(heads, rotation_of(jnp.asarray([[at]]), frequencies))
            for heads, at in ((query, at_query), (key, at_key))
        )
        return float((next(turned) * next(turned)).sum())

    assert product(7, 4) == pytest.approx(product(3, 0), abs=1e-5)
    assert product(7, 4) != pytest.approx(product(7, 5), abs=1e-3)
    assert product(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-5)


def test_relative_buckets_by_hand():
    """Eight buckets up to distance 16, as the paper's appendix describes them."""
    distances = jnp.asarray([-40, -16, -8, -4, -3, -2, -1, 0, 1, 2, 3, 4, 8, 16, 40])
    both = relative_buckets(distances, True, 8, 16)
    np.testing.assert_array_equal(both, [3, 3, 3, 2, 2, 2, 1, 0, 5, 6, 6, 6, 7, 7, 7])
    behind = relative_buckets(distances, False, 8, 16)
    np.testing.assert_array_equal(behind, [7, 7, 6, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0])


def test_positions_and_masks_of_a_cache():
    mask = jnp.asarray([[True, True, False], [False, True, True]])
    np.testing.assert_array_equal(positions_of(mask), [[0, 1, 1], [0, 0, 1]])
    cache = empty_cache(layers=1, rows=2, slots=5, heads=1, size=2, dtype="float32")
    pairs, cache = attendable(mask, cache)
    expected = [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]],
    ]
    np.testing.assert_array_equal(pairs[:, 0], np.asarray(expected, bool))
    cache = cache.written(cache.arrays, 3)
    more = jnp.ones((2, 1), bool)
    np.testing.assert_array_equal(positions_of(more, cache), [[2], [2]])
    pairs, cache = attendable(more, cache)
    np.testing.assert_array_equal(
        pairs[:, 0, 0], np.asarray([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0]], bool)
    )
    hidden = jnp.arange(6.0).reshape(2, 3, 1)
    np.testing.assert_array_equal(last_real(hidden, mask)[:, 0, 0], [1, 5])
