"""What a run learns: data, a model and what it is for."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedqsn_jax.config.schema import (
    FEDSP,
    Config,
    DataConfig,
    FedSPConfig,
    GenerationConfig,
    ModelConfig,
)
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.types import ApplyFn, Params
from fedqsn_jax.data.population import Splits
from fedqsn_jax.data.text.prompts import Prompts
from fedqsn_jax.generation.text_evaluation import TextEvaluator
from fedqsn_jax.problems.limits import MODEL
from fedqsn_jax.problems.training import Preparation


@dataclasses.dataclass(frozen=True)
class ProblemSettings:
    """All of a configuration that a problem can depend on, since whatever makes one gets no more.

    So problems of equal settings are the same, and one of them serves every run that has them.

    Attributes:
      seed: Divides the data, and draws what the model has not.
      data: Which data.
      model: Which model.
      generation: Which texts it is to write.
      server_dropout: Dropout in the server's own training.
      client_dropout: Dropout in clients' training.
      compute_dtype: In which language models compute.
      label_smoothing: Of completions.
      prompted: Of FedSP; None: another algorithm, and so another tree of parameters.
    """

    seed: int
    data: DataConfig
    model: ModelConfig
    generation: GenerationConfig
    server_dropout: float
    client_dropout: float
    compute_dtype: str
    label_smoothing: float
    prompted: FedSPConfig | None


def problem_settings(config: Config) -> ProblemSettings:
    """Returns those of a configuration's settings that its problem can depend on."""
    return ProblemSettings(
        seed=config.seed,
        data=config.data,
        model=config.model,
        generation=config.generation,
        server_dropout=config.pretraining.dropout,
        client_dropout=config.client.dropout,
        compute_dtype=config.client.compute_dtype,
        label_smoothing=config.client.label_smoothing,
        prompted=config.fedsp if config.algorithm == FEDSP else None,
    )


class Texts(NamedTuple):
    """The texts that a model is to write.

    Attributes:
      prompts: What is to be answered, and what should have come out.
      make_evaluator: ``on_prompts -> evaluator`` of one set of parameters; ``on_prompts`` is told
        how many more prompts are done.
    """

    prompts: Prompts
    make_evaluator: Callable[[Callable[[int], None]], TextEvaluator]


class Problem(NamedTuple):
    """Data, a model that the server has not trained yet, and what it is for.

    Attributes:
      splits: The data, divided.
      params: The model's parameters: random, or those of a pre-trained model.
      apply_fn: The model, as it is evaluated.
      pretraining_apply: The model, as the server trains it on its own rows.
      client_apply: The model, as clients train it; None: ``apply_fn`` in their compute dtype.
      task: Loss and metrics.
      texts: What it is to write at the end; None: nothing.
      preparation: What the server does before the first round beside its own training; None:
        nothing.
      notes: What the user should know about how these came to be, a line each.
      files: What lay beside a pre-trained model's weights; a run keeps copies for its export.
      size: The setting that decides on the model's size; see `limits`.
      name: What the data are called; empty: as the configuration calls them.
    """

    splits: Splits
    params: Params
    apply_fn: ApplyFn
    pretraining_apply: ApplyFn
    client_apply: ApplyFn | None
    task: Task
    texts: Texts | None = None
    preparation: Preparation | None = None
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    size: str = MODEL
    name: str = ""
