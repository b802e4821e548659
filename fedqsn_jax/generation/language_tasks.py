"""Tasks of language models: classification of texts, and generation of completions.

Batches are named as `data.text.packing` packs them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.core.tasks import Task, classification, mean
from fedqsn_jax.core.types import Array, Batch
from fedqsn_jax.models.language.output_layer import Unprojected, token_losses


def sequence_classification(f1: bool = False, label: str = "label") -> Task:
    """Classification of texts by softmax cross-entropy, as `tasks.classification`.

    Args:
      f1: Whether ``f1`` is a metric too: the harmonic mean of precision and recall of label 1, as
        GLUE has it for MRPC and QQP; 0 where that label is neither there nor predicted.
      label: The name of the labels in a batch.
    """
    plain = classification(label)
    if not f1:
        return plain

    def statistics(outputs: Array, batch: Batch, valid: Array) -> dict[str, Array]:
        said, true = outputs.argmax(-1) == 1, batch[label] == 1

        def count(rows: Array) -> Array:
            return (rows & valid).sum(dtype=jnp.float32)

        return plain.statistics(outputs, batch, valid) | {
            "true_positives": count(said & true),
            "false_positives": count(said & ~true),
            "false_negatives": count(~said & true),
        }

    def summarize(sums: dict[str, Array]) -> dict[str, Array]:
        twice = 2 * sums["true_positives"]
        errors = sums["false_positives"] + sums["false_negatives"]
        f1 = twice / jnp.maximum(twice + errors, 1)
        return plain.summarize(sums) | {"f1": jnp.where(sums["count"] > 0, f1, jnp.nan)}

    return plain._replace(statistics=statistics, summarize=summarize)


def conditional_generation(label_smoothing: float = 0.0, encoder_decoder: bool = False) -> Task:
    """Generation of completions: cross-entropy of their tokens, each token weighing the same.

    Outputs are logits ``[rows, length, vocabulary]``, or for the loss `Unprojected`. Of a decoder,
    those at a position predict the next token, and ``loss_mask`` says which tokens are to be
    predicted; of an encoder-decoder, they predict ``target_tokens`` at the same position where
    ``target_mask`` is true.

    Metrics are ``loss`` (nats a token, never smoothed), ``perplexity`` (its exponential) and
    ``token_accuracy`` (share of tokens that are the likeliest after the true ones before them).

    Args:
      label_smoothing: Share of the target that is spread evenly over the vocabulary, in training
        only; the paper's code has 0.1.
      encoder_decoder: Which of the two the model is.

    Raises:
      ValueError: The smoothing is not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing = {label_smoothing}: allowed is 0 to below 1")

    def targets(batch: Batch, valid: Array) -> tuple[Array, Array]:
        """The token that each position predicts, and whether it counts."""
        if encoder_decoder:
            tokens, mask = batch["target_tokens"], batch["target_mask"]
        else:
            # The targets move, not the logits, which are thousands of times larger.
            tokens = jnp.roll(batch["tokens"], -1, axis=1)
            mask = jnp.roll(batch["loss_mask"], -1, axis=1).at[:, -1].set(False)
        return tokens, (mask != 0) & valid[:, None]

    def losses(outputs: Any, tokens: Array, smoothing: float) -> Array:
        """Nats ``[rows, length]``: of the one-hot target mixed with the uniform distribution."""
        if isinstance(outputs, Unprojected):
            return token_losses(outputs, tokens, smoothing)
        logits = outputs.astype(jnp.float32)
        at_target = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        if smoothing:
            at_target = (1 - smoothing) * at_target + smoothing * logits.mean(axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - at_target

    def loss(outputs: Any, batch: Batch, valid: Array) -> Array:
        tokens, counts = targets(batch, valid)
        each = jnp.where(counts, losses(outputs, tokens, label_smoothing), 0)
        return each.sum() / jnp.maximum(counts.sum(), 1)

    def statistics(outputs: Array, batch: Batch, valid: Array) -> dict[str, Array]:
        tokens, counts = targets(batch, valid)
        return {
            "loss": jnp.where(counts, losses(outputs, tokens, 0.0), 0).sum(),
            "correct": ((outputs.argmax(-1) == tokens) & counts).sum(dtype=jnp.float32),
            "tokens": counts.sum(dtype=jnp.float32),
            "count": counts.any(axis=1).sum(dtype=jnp.float32),
        }

    def summarize(sums: dict[str, Array]) -> dict[str, Array]:
        nats = mean(sums["loss"], sums["tokens"])
        return {
            "token_accuracy": mean(sums["correct"], sums["tokens"]),
            "loss": nats,
            "perplexity": jnp.exp(nats),
        }

    return Task(loss, statistics, summarize, score="token_accuracy")
