"""When views are evaluated, texts are written and models are saved: sections of `settings.Config`.

A line a field, as in `settings`.
"""

import dataclasses

from fedqsn_jax.config.choices import FEDSP
from fedqsn_jax.config.fields import between, field, unless
from fedqsn_jax.config.problem_settings import LAYERS, STEPS


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When and how the four views are evaluated."""

    every: int = field(1, between(1), "rounds between evaluations; the last is always evaluated")
    batch_size: int = field(512, between(1), "rows at a time")
    proxy_samples: int = field(8, between(2), "client masks that the proxy view averages over")
    attackers: tuple[int, ...] = field(
        (1, 10), LAYERS, "numbers of colluding clients; (): no attackers are kept"
    )
    fine_tuned_attackers: int = field(
        0,
        STEPS,
        "most steps that they train what they hold, on rows of their own, after the last round; "
        "0: they do not",
        unless("algorithm", FEDSP),
    )


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The texts that every view writes after the last round, where the task is to write."""

    prompts: int = field(0, between(0), "distinct test prompts that are answered; 0: none")
    batch_size: int = field(64, between(1), "prompts at a time")
    proxy_samples: int = field(2, between(1), "client masks that the proxy view averages over")
    new_tokens: int = field(64, between(1), "most tokens of a text")
    beams: int = field(10, between(1), "hypotheses of the beam search; 1: greedy")
    no_repeat_ngram: int = field(4, between(0), "so many tokens never occur twice; 0: they may")
    length_penalty: float = field(
        0.9, between(-10, 10), "exponent of the length that a score is divided by"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the hidden model is saved, and which saves are kept."""

    every: int = field(10, between(1), "rounds between saves; the last round is always saved")
    keep_latest: int = field(2, between(1), "latest saves kept")
    keep_best: int = field(
        1, between(0), "beside the latest, the saved rounds of the best global score, so many"
    )
