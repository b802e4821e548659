"""What a run learns: data, a model and what it is for."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedqsn_jax.data.federated import Splits
from fedqsn_jax.data.prompts import Prompts
from fedqsn_jax.pretraining import Preparation
from fedqsn_jax.tasks import Task
from fedqsn_jax.text_evaluation import TextEvaluator
from fedqsn_jax.types import ApplyFn, Params


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
