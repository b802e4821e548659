"""Evaluation of parameters by the texts they generate: a Python loop around one jitted call."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.types import Batch, Params
from fedqsn_jax.data.text.prompts import Prompts
from fedqsn_jax.data.text.tokenization import TextTokenizer
from fedqsn_jax.generation.beam_search import Generated
from fedqsn_jax.generation.scores import bleu, rouge_l


class TextEvaluation(NamedTuple):
    """What a set of parameters wrote.

    Attributes:
      metrics: ``bleu`` and ``rouge_l``, 0 to 100, against all references.
      texts: One text a prompt.
    """

    metrics: dict[str, float]
    texts: list[str]


TextEvaluator = Callable[[Params], TextEvaluation]
"""Generates and scores; parameters of one structure compile once."""


def make_text_evaluator(
    generate: Callable[[Params, Batch], Generated],
    tokenizer: TextTokenizer,
    prompts: Prompts,
    batch_size: int,
    on_prompts: Callable[[int], None] = lambda count: None,
) -> TextEvaluator:
    """Makes the evaluation of parameters on a test set's prompts.

    Args:
      generate: From `beam_search.make_generator`; it is jitted here.
      tokenizer: Turns tokens into text.
      prompts: What to continue, and what was to come out.
      batch_size: Prompts at a time; the last batch is filled up.
      on_prompts: Told how many more prompts are done.
    """
    count = len(prompts.texts)
    size = min(batch_size, count)
    jitted = jax.jit(generate)

    def evaluate(params: Params) -> TextEvaluation:
        texts: list[str] = []
        for start in range(0, count, size):
            # Every batch has the same shape; surplus rows repeat the last prompt.
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch = {
                "tokens": jnp.asarray(prompts.tokens[rows]),
                "mask": jnp.asarray(prompts.mask[rows]),
            }
            real = min(size, count - start)
            tokens = np.asarray(jitted(params, batch).tokens)[:real]
            texts += [tokenizer.decode(row) for row in tokens]
            on_prompts(real)
        metrics = {
            "bleu": bleu(texts, prompts.references),
            "rouge_l": rouge_l(texts, prompts.references),
        }
        return TextEvaluation(metrics, texts)

    return evaluate
