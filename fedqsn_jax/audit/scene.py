"""What an attack has to work with: the run, the coalition, what it holds and owns, programs."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedqsn_jax.audit.adversaries import HALF, Adversary
from fedqsn_jax.audit.alone import Federate, make_colluders_federation
from fedqsn_jax.audit.case import Case
from fedqsn_jax.audit.distillation import distillation_loss
from fedqsn_jax.audit.evaluation import (
    Answers,
    make_answering,
)
from fedqsn_jax.audit.received import Holdings
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.trees import tree_bytes
from fedqsn_jax.core.types import Batch, Key, Params
from fedqsn_jax.host.devices import device_bytes
from fedqsn_jax.rounds.evaluation import make_held_measure
from fedqsn_jax.rounds.fine_tuning import (
    COPIES,
    RATES,
    FineTune,
    Loss,
    Measure,
    make_fine_tuning,
)
from fedqsn_jax.rounds.pooled_rows import Divided, PooledRows


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """How thorough an audit is.

    Attributes:
      colluders: Numbers of colluding clients; ``half`` is half of all.
      queries: Numbers of questions to the owner's model.
      rates: Adam's rates that every training tries.
      steps: The most steps of a training; 0: as many as ten passes over the rows have, 200 to 1000.
      shadows: Shadow models of the membership attack.
      findings: Whether what makes no model is looked for too: membership, the others' updates.
      seed: Draws what is held back, batches and queries.
    """

    colluders: tuple[int | str, ...] = (1, 3, HALF)
    queries: tuple[int, ...] = (50, 500, 10_000)
    rates: tuple[float, ...] = RATES
    steps: int = 0
    shadows: int = 4
    findings: bool = True
    seed: int = 0


class Tools(NamedTuple):
    """Programs that all attacks share.

    Attributes:
      fine_tune: Trains by the task's loss.
      distil: Trains by the owner's answers.
      federate: FedAvg among colluders.
      answer: What a model says of rows.
      measure: Score and loss on held-back rows.
      batch_size: Rows that a model is asked at a time.
    """

    fine_tune: FineTune
    distil: FineTune
    federate: Federate
    answer: Callable[[Params, Batch], Answers]
    measure: Measure
    batch_size: int


class Scene(NamedTuple):
    """One coalition's means.

    Attributes:
      case: The run.
      settings: How thorough the audit is.
      adversary: The coalition.
      holdings: What it received.
      divided: What it owns, on the host.
      rows: The same on the device, padded.
      tools: Shared programs.
      owner: The owner's plain model; attacks only ask it, and only as many questions as they say.
      base: A public base, or None.
      owner_test: The owner's answers to the test rows.
      most_members: Members of the largest coalition.
      places: Rows to train on, and rows that are held back, of the largest coalition.
    """

    case: Case
    settings: AuditSettings
    adversary: Adversary
    holdings: Holdings
    divided: Divided
    rows: PooledRows
    tools: Tools
    owner: Params
    base: Params | None
    owner_test: Answers
    most_members: int
    places: tuple[int, int]

    @property
    def row_count(self) -> int:
        """Number of rows that the coalition trains on."""
        return int(self.rows.trained)

    @property
    def steps(self) -> int:
        """The most steps of a training on the coalition's rows."""
        size = self.case.config.client.batch_size
        return self.settings.steps or min(max(10 * self.row_count // size, 200), 1000)

    def key(self, name: str) -> Key:
        """The key of one attack's draws."""
        return fold_in_name(root_key(self.settings.seed), f"{self.adversary.name}/{name}")

    def held_score(self, params: Params) -> tuple[float, float]:
        """Score and loss of a model on the rows that are held back."""
        score, loss = self.tools.measure(params, self.rows.held, self.rows.kept)
        return float(score), float(loss)


def make_tools(case: Case, settings: AuditSettings) -> Tools:
    """Makes the shared programs."""
    batch_size = case.config.evaluation.batch_size
    measure = make_held_measure(case.apply_fn, case.task, batch_size)
    shapes = jax.eval_shape(case.owner, case.final)
    room = device_bytes() // 4
    at_once = max(1, min(len(settings.rates), room // max(1, COPIES * tree_bytes(shapes))))
    common: dict[str, Any] = {"batch_size": case.config.client.batch_size, "rates": settings.rates}

    def make(loss: Loss) -> FineTune:
        return make_fine_tuning(case.train_apply, loss, measure, at_once=at_once, **common)

    return Tools(
        make(case.task.loss),
        make(distillation_loss),
        make_colluders_federation(
            case.train_apply, case.task.loss, measure, rounds=12, local_steps=20, **common
        ),
        make_answering(case.apply_fn, case.task, batch_size),
        jax.jit(measure),
        batch_size,
    )
