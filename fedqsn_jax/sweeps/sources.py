"""What points of a sweep start from, made once for all that share it, whatever their programs.

That is data and model, which take seconds to read where they are a language model's, and the model
after the server's own training, which takes a compilation and its steps. Points of other methods,
of other clients' settings and so on start from the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

from fedqsn_jax.config import ClientConfig, Config, PretrainingConfig
from fedqsn_jax.configured import algorithm_of, federation_key
from fedqsn_jax.data.federated import ClientData
from fedqsn_jax.data.held_out import HeldOut
from fedqsn_jax.experiment import Experiment, load_problem, prepare
from fedqsn_jax.memory import tree_bytes
from fedqsn_jax.metrics import make_evaluator
from fedqsn_jax.pretraining import make_pretraining
from fedqsn_jax.problem import Problem
from fedqsn_jax.types import Key, Params

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


class Sources:
    """Loads data and models, and trains them as the server does, each once."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        """Starts with nothing.

        Args:
          kept_bytes: How much is kept; see `KEPT_BYTES`.
        """
        self._kept_bytes = kept_bytes
        self._kept: dict[tuple[str, Config], Any] = {}
        self._compiled: tuple[Config, Any, Any] | None = None

    def prepare(self, config: Config) -> Experiment:
        """As `experiment.prepare`, with data and model that may be another point's, too.

        Raises:
          ConfigError: The configuration is not possible.
        """
        return prepare(config, self._once(_loaded_by(config), load_problem, config))

    def start(self, experiment: Experiment) -> Start:
        """Does what depends on a seed alone: the server's own training.

        Args:
          experiment: What `prepare` returned.
        """
        config = experiment.config
        params, score = self._once(_trained_by(config), self._train, experiment)
        clients = experiment.problem.splits.clients
        return Start(federation_key(config), params, clients, experiment.held_out, score)

    def _train(self, experiment: Experiment) -> tuple[Params, float]:
        config, problem = experiment.config, experiment.problem
        train, evaluate = self._functions(config, problem)
        params = train(config.seed, problem.params, problem.splits.private)
        score = float(evaluate(params, problem.splits.test)[problem.task.score])
        return params, score

    def _functions(self, config: Config, problem: Problem) -> tuple[Any, Any]:
        """The compiled functions of `_train`; the latest ones serve all seeds."""
        kind = dataclasses.replace(_trained_by(config), seed=0)
        if self._compiled is None or self._compiled[0] != kind:
            evaluate = make_evaluator(problem.apply_fn, problem.task, config.evaluation.batch_size)
            train = make_pretraining(
                config, problem.pretraining_apply, problem.task, problem.preparation
            )
            self._compiled = kind, train, jax.jit(evaluate)
        return self._compiled[1:]

    def _once(self, by: Config, make: Callable[[Any], T], of: Any) -> T:
        """Returns ``make(of)``, which depends on ``by`` alone."""
        key = make.__name__, by
        made = self._kept.pop(key) if key in self._kept else make(of)
        # The latest used is the last.
        self._kept[key] = made
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > self._kept_bytes:
            del self._kept[next(iter(self._kept))]
        return made


def _loaded_by(config: Config) -> Config:
    """The configuration with all that plays no part in data and model at defaults."""
    client = config.client
    base = Config()
    if algorithm_of(config).prompts_only:
        base = dataclasses.replace(base, algorithm=config.algorithm, fedsp=config.fedsp)
    return dataclasses.replace(
        base,
        seed=config.seed,
        data=config.data,
        model=config.model,
        generation=config.generation,
        pretraining=PretrainingConfig(dropout=config.pretraining.dropout),
        client=ClientConfig(
            dropout=client.dropout,
            compute_dtype=client.compute_dtype,
            label_smoothing=client.label_smoothing,
        ),
    )


def _trained_by(config: Config) -> Config:
    """The same for what the server's own training comes to."""
    return dataclasses.replace(
        _loaded_by(config), pretraining=config.pretraining, evaluation=config.evaluation
    )


def _bytes(kept: Any) -> int:
    """Bytes of the arrays of a problem, or of parameters with their score."""
    if not isinstance(kept, Problem):
        return tree_bytes(kept[0])
    splits = kept.splits
    rows = (splits.private, splits.test, splits.client_tests)
    return tree_bytes((kept.params, rows)) + splits.clients.device_bytes
