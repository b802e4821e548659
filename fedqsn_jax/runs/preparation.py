"""What a run needs before it writes anything: data, a model and a method that fit."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from fedqsn_jax.config.schema import LANGUAGE, Config
from fedqsn_jax.core.types import Batch
from fedqsn_jax.data.population import HeldOut
from fedqsn_jax.problems.images import load_image_problem
from fedqsn_jax.problems.problem import Problem, ProblemSettings, problem_settings
from fedqsn_jax.problems.training import hold_back
from fedqsn_jax.simulation.compose import Simulation, make_simulation
from fedqsn_jax.simulation.fine_tuned_attackers import trains_attackers
from fedqsn_jax.simulation.fitting import Model
from fedqsn_jax.simulation.limits import (
    check_evaluation,
    check_pretraining,
    check_trained_attackers,
)
from fedqsn_jax.simulation.running import (
    place,
)


class Experiment(NamedTuple):
    """A configuration with its data and its untrained model.

    Attributes:
      config: What to run.
      problem: Data, model and task; the data in their place.
      simulation: The method.
    """

    config: Config
    problem: Problem
    simulation: Simulation

    @property
    def private(self) -> Batch:
        """The server's rows that it trains on."""
        return hold_back(self.config, self.problem.splits.private)[0]

    @property
    def held_out(self) -> HeldOut:
        """What is evaluated on."""
        splits = self.problem.splits
        _, validation = hold_back(self.config, splits.private)
        return HeldOut(splits.test, splits.client_tests, validation)


def prepare(
    config: Config,
    problem: Problem | None = None,
    noise: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Experiment:
    """Loads the data, initializes the model and composes the method; writes nothing.

    Args:
      config: What to run.
      problem: What `load_problem` returned for its `problem_settings`, if that was called.
      noise: The noise multiplier that was found for the run before, if it was.
      tell: Is told what takes long.

    Raises:
      ConfigError: The configuration is not possible.
    """
    problem = problem or load_problem(problem_settings(config))
    if config.privacy.epsilon and noise is None:
        tell(
            f"the noise for privacy.epsilon = {config.privacy.epsilon} is being computed; it may "
            f"take half a minute"
        )
    simulation = make_simulation(
        config,
        problem.apply_fn,
        problem.task,
        problem.params,
        problem.splits.clients,
        problem.client_apply,
        size=problem.size,
        noise=noise,
    )
    splits = problem.splits
    hold_back(config, splits.private)  # Refused before anything is trained.
    clients, test, client_tests = place(
        simulation, (splits.clients, splits.test, splits.client_tests)
    )
    splits = splits._replace(clients=clients, test=test, client_tests=client_tests)
    _check_memory(config, problem, simulation)
    return Experiment(config, problem._replace(splits=splits), simulation)


def _check_memory(config: Config, problem: Problem, simulation: Simulation) -> None:
    """Refuses what comes before and between the rounds where it does not fit, as they were."""
    shapes = jax.eval_shape(lambda tree: tree, problem.params)
    model = Model(
        problem.apply_fn, problem.pretraining_apply, problem.task, shapes, size=problem.size
    )
    check_pretraining(config, model, problem.splits.private)
    check_evaluation(config, model, problem.splits.test, simulation.held_bytes)
    if trains_attackers(config):
        check_trained_attackers(config, model, problem.splits.test, simulation.held_bytes)


def load_problem(settings: ProblemSettings, shapes: bool = False) -> Problem:
    """Loads the data and initializes the model, or reads its pre-trained weights.

    Args:
      settings: Which.
      shapes: Whether shapes do for parameters that would be initialized.

    Raises:
      ConfigError: One of them is absent or damaged, or they do not fit each other.
    """
    if settings.model.name != LANGUAGE:
        return load_image_problem(settings, shapes)
    # Only here: images do without what texts need, which takes a second to import.
    from fedqsn_jax.problems.language import load_language_problem

    return load_language_problem(settings)
