"""Tasks of language models against NumPy, one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import f1_score

from fedqsn_jax.generation.language_tasks import conditional_generation, sequence_classification

ROWS, LENGTH, VOCABULARY = 5, 7, 11
VALID = jnp.asarray([True, True, False, True, True])


def jitted(task):
    """The same task, compiled: one operation after the other would take seconds to compile."""
    return task._replace(loss=jax.jit(task.loss), statistics=jax.jit(task.statistics))


def example(encoder_decoder):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 2, (ROWS, LENGTH, VOCABULARY)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, LENGTH)), jnp.int32)
    mask = jnp.asarray(rng.random((ROWS, LENGTH)) < 0.6)
    # A row without a completion, and a mask on the first token, which a decoder never predicts.
    mask = mask.at[4].set(False).at[0, 0].set(True).at[0, LENGTH - 1].set(True)
    names = ("target_tokens", "target_mask") if encoder_decoder else ("tokens", "loss_mask")
    return logits, dict(zip(names, (tokens, mask), strict=True))


def counted(logits, batch, encoder_decoder):
    """The log-probabilities and the target of every token that counts, one by one."""
    tokens, mask = (np.asarray(array) for array in batch.values())
    log_odds = np.asarray(logits, np.float64)
    log_odds -= np.log(np.exp(log_odds).sum(axis=-1, keepdims=True))
    shift = 0 if encoder_decoder else 1
    for row, position in np.argwhere(mask):
        if VALID[row] and position >= shift:
            yield log_odds[row, position - shift], tokens[row, position]


@pytest.mark.parametrize("encoder_decoder", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_generation_weighs_every_token_the_same(encoder_decoder, smoothing):
    task = jitted(conditional_generation(smoothing, encoder_decoder))
    logits, batch = example(encoder_decoder)
    each = list(counted(logits, batch, encoder_decoder))
    nats = np.mean([-log_odds[token] for log_odds, token in each])
    uniform = np.mean([-log_odds.mean() for log_odds, _ in each])
    expected = (1 - smoothing) * nats + smoothing * uniform
    np.testing.assert_allclose(task.loss(logits, batch, VALID), expected, rtol=1e-6)
    sums = task.statistics(logits, batch, VALID)
    # Of the four rows that count the last has no completion.
    assert (float(sums["count"]), float(sums["tokens"])) == (3, len(each))
    metrics = task.summarize(sums)
    correct = np.mean([log_odds.argmax() == token for log_odds, token in each])
    np.testing.assert_allclose(metrics["loss"], nats, rtol=1e-6)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(nats), rtol=1e-5)
    np.testing.assert_allclose(metrics["token_accuracy"], correct, rtol=1e-6)
    assert task.score in metrics


def test_smoothing_is_optaxs():
    logits, batch = example(True)
    task = jitted(conditional_generation(0.1, encoder_decoder=True))
    smoothed = optax.smooth_labels(jax.nn.one_hot(batch["target_tokens"], VOCABULARY), 0.1)
    each = optax.softmax_cross_entropy(logits, smoothed)
    counts = batch["target_mask"] & VALID[:, None]
    expected = jnp.where(counts, each, 0).sum() / counts.sum()
    np.testing.assert_allclose(task.loss(logits, batch, VALID), expected, rtol=1e-6)


@pytest.mark.parametrize("task", [conditional_generation(), sequence_classification(f1=True)])
def test_statistics_add_up_over_batches(task):
    logits, batch = example(False)
    if task.score == "accuracy":
        logits, batch = logits[:, 0, :2], {"label": batch["tokens"][:, 0] % 2}

    def part(rows):
        some = {name: array[rows] for name, array in batch.items()}
        return jax.jit(task.statistics)(logits[rows], some, VALID[rows])

    first, second, whole = part(slice(0, 2)), part(slice(2, 5)), part(slice(0, 5))
    assert set(first) == set(whole)
    for name in whole:
        np.testing.assert_allclose(first[name] + second[name], whole[name], rtol=1e-6)


@pytest.mark.parametrize("task", [conditional_generation(0.1), sequence_classification(f1=True)])
def test_nothing_valid_has_no_loss_no_gradient_and_no_metrics(task):
    logits, batch = example(False)
    if task.score == "accuracy":
        logits, batch = logits[:, 0, :2], {"label": batch["tokens"][:, 0] % 2}
    nothing = jnp.zeros(ROWS, bool)
    value, gradient = jax.jit(jax.value_and_grad(task.loss))(logits, batch, nothing)
    assert float(value) == 0
    assert not gradient.any()
    metrics = task.summarize(jitted(task).statistics(logits, batch, nothing))
    assert all(np.isnan(value) for value in metrics.values())


def test_masked_rows_have_no_gradient():
    logits, batch = example(False)
    gradient = jax.jit(jax.grad(conditional_generation(0.1).loss))(logits, batch, VALID)
    mask = np.asarray(batch["loss_mask"])
    moved = np.asarray(jnp.abs(gradient).sum(axis=-1) > 0)
    expected = np.roll(mask, -1, axis=1)
    expected[:, -1] = False
    expected &= np.asarray(VALID)[:, None]
    assert np.array_equal(moved, expected)


def test_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 2)).astype(np.float32)
    labels = rng.integers(0, 2, 40)
    valid = rng.random(40) < 0.7
    task = jitted(sequence_classification(f1=True))
    sums = task.statistics(
        jnp.asarray(logits), {"label": jnp.asarray(labels, jnp.int32)}, jnp.asarray(valid)
    )
    metrics = task.summarize(sums)
    said = logits.argmax(axis=1)
    np.testing.assert_allclose(metrics["f1"], f1_score(labels[valid], said[valid]), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (labels == said)[valid].mean(), rtol=1e-6)
    assert set(sequence_classification().summarize(sums)) == {"accuracy", "loss"}
    stacked = {name: jnp.stack([value, value]) for name, value in sums.items()}
    assert task.summarize(stacked)["f1"].shape == (2,)


def test_smoothing_has_a_range():
    with pytest.raises(ValueError, match=r"label_smoothing = 1\.0: allowed is 0 to below 1"):
        conditional_generation(1.0)


@pytest.mark.parametrize("task", [conditional_generation(), sequence_classification()])
def test_metrics_of_nothing_are_absent(task):
    """Zero divided by zero is no loss of zero, no accuracy of zero and no perplexity of one."""
    names = ("loss", "correct", "tokens", "count")
    nothing = task.summarize(dict.fromkeys(names, jnp.asarray([0.0, 0.0])))
    assert all(np.isnan(values).all() for values in nothing.values())
    some = task.summarize(dict.fromkeys(names, jnp.asarray([0.0, 2.0])))
    assert np.isnan(some["loss"]).tolist() == [True, False]
    assert some["loss"][1] == 1
