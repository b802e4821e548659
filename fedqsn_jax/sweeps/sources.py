"""What points of a sweep start from, made once for all that share it, whatever their programs.

That is data and model, which take seconds to read where they are a language model's, and the model
after the server's own training, which takes a compilation and its steps. Points of other methods,
of other clients' settings and so on start from the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

from fedqsn_jax.config.schema import Config, EvaluationConfig, PretrainingConfig
from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.core.trees import tree_bytes
from fedqsn_jax.core.types import Key, Params
from fedqsn_jax.data.population import ClientData, HeldOut
from fedqsn_jax.problems.problem import Problem, ProblemSettings, problem_settings
from fedqsn_jax.problems.training import hold_back, make_pretraining
from fedqsn_jax.rounds.evaluation import make_evaluator
from fedqsn_jax.runs.experiment import Experiment, load_problem, prepare

KEPT_BYTES = 2**31
"""Of data and parameters that are kept for later points; beyond, the oldest are dropped."""

T = TypeVar("T")


class Start(NamedTuple):
    """What a seed fixes.

    Attributes:
      key: Of the federation.
      params: The parameters after the server's own training.
      data: The clients' rows.
      test: Held-out rows, also of clients.
      score: The global score before the first round.
    """

    key: Key
    params: Params
    data: ClientData
    test: HeldOut
    score: float


class _Training(NamedTuple):
    """All that the server's own training, and the score after it, can depend on."""

    problem: ProblemSettings
    pretraining: PretrainingConfig
    evaluation: EvaluationConfig
    private_rows: int


class Sources:
    """Loads data and models, and trains them as the server does, each once."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        """Starts with nothing.

        Args:
          kept_bytes: How much is kept; see `KEPT_BYTES`.
        """
        self._kept_bytes = kept_bytes
        # By all that each was made of: nothing else is known where it is made.
        self._kept: dict[ProblemSettings | _Training, Any] = {}
        self._compiled: tuple[_Training, Any, Any] | None = None

    def prepare(self, config: Config) -> Experiment:
        """As `preparation.prepare`, with data and model that may be another point's, too.

        Raises:
          ConfigError: The configuration is not possible.
        """
        settings = problem_settings(config)
        return prepare(config, self._once(settings, lambda: load_problem(settings)))

    def start(self, experiment: Experiment) -> Start:
        """Does what depends on a seed alone: the server's own training.

        Args:
          experiment: What `prepare` returned.
        """
        config, problem = experiment.config, experiment.problem
        private, _ = hold_back(config, problem.splits.private)
        training = _Training(
            problem=problem_settings(config),
            pretraining=config.pretraining,
            evaluation=config.evaluation,
            private_rows=jax.tree.leaves(private)[0].shape[0],
        )
        params, score = self._once(training, lambda: self._train(training, problem))
        clients = problem.splits.clients
        return Start(federation_key(config.seed), params, clients, experiment.held_out, score)

    def _train(self, training: _Training, problem: Problem) -> tuple[Params, float]:
        train, evaluate = self._functions(training, problem)
        private = {
            name: rows[: training.private_rows] for name, rows in problem.splits.private.items()
        }
        params = train(training.problem.seed, problem.params, private)
        score = float(evaluate(params, problem.splits.test)[problem.task.score])
        return params, score

    def _functions(self, training: _Training, problem: Problem) -> tuple[Any, Any]:
        """The compiled functions of `_train`; the latest ones serve all seeds."""
        kind = training._replace(problem=dataclasses.replace(training.problem, seed=0))
        if self._compiled is None or self._compiled[0] != kind:
            rows = training.evaluation.batch_size
            evaluate = make_evaluator(problem.apply_fn, problem.task, rows)
            train = make_pretraining(
                training.pretraining, problem.pretraining_apply, problem.task, problem.preparation
            )
            self._compiled = kind, train, jax.jit(evaluate)
        return self._compiled[1:]

    def _once(self, key: ProblemSettings | _Training, make: Callable[[], T]) -> T:
        """Returns ``make()``, which depends on ``key`` alone."""
        made = self._kept.pop(key) if key in self._kept else make()
        # The latest used is the last.
        self._kept[key] = made
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > self._kept_bytes:
            del self._kept[next(iter(self._kept))]
        return made


def _bytes(kept: Any) -> int:
    """Bytes of the arrays of a problem, or of parameters with their score."""
    if not isinstance(kept, Problem):
        return tree_bytes(kept[0])
    splits = kept.splits
    rows = (splits.private, splits.test, splits.client_tests)
    return tree_bytes((kept.params, rows)) + splits.clients.device_bytes
