"""The main job: data, the server's own training, rounds, checkpoints and reports."""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from fedqsn_jax.config.schema import LANGUAGE, Config
from fedqsn_jax.core.keys import root_key
from fedqsn_jax.core.types import Batch
from fedqsn_jax.data.population import HeldOut
from fedqsn_jax.data.splits import fingerprint
from fedqsn_jax.host import distributed
from fedqsn_jax.host.atomic_files import FileError, told_as_file_error
from fedqsn_jax.host.checkpoints import CheckpointError, Checkpoints
from fedqsn_jax.host.signals import stopping_at
from fedqsn_jax.problems.images import load_image_problem
from fedqsn_jax.problems.problem import Problem, ProblemSettings, problem_settings
from fedqsn_jax.problems.training import first_steps, hold_back, pretrain
from fedqsn_jax.reporting.display import Display, draw_safely
from fedqsn_jax.reporting.summary import Costs, summarize
from fedqsn_jax.reporting.verdict import verdict
from fedqsn_jax.reporting.writers import MetricsFile, TensorBoard, write_json
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.rounds.views import has_received
from fedqsn_jax.runs.room import check_room
from fedqsn_jax.runs.working_directory import WorkDirectory
from fedqsn_jax.runs.written_texts import passes, write_texts
from fedqsn_jax.simulation.compose import Simulation, make_simulation
from fedqsn_jax.simulation.costs import expected_costs, tensor_rows
from fedqsn_jax.simulation.fitting import Model
from fedqsn_jax.simulation.limits import check_evaluation, check_pretraining
from fedqsn_jax.simulation.memory import answer_out_of_memory
from fedqsn_jax.simulation.running import (
    Entry,
    first_entry,
    initial_state,
    place,
    run_rounds,
)
from fedqsn_jax.simulation.warnings import warnings_after_run, warnings_before_run

OnEntries = Callable[[int, list[Entry]], None]
"""Called with the number of finished rounds, and what was newly evaluated."""


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


def dry_run(
    config: Config, directory: Path | None, display: Display, chosen: Collection[str] = ()
) -> None:
    """Shows the model's tensors and mask sites, bytes and memory; trains and writes nothing.

    A run may be at work in the directory meanwhile.

    Args:
      config: What would run.
      directory: Where, if that is known.
      display: Where it is shown.
      chosen: Fields that the user set one by one; see `unused.ignored_settings`.

    Raises:
      ConfigError: The run would be refused.
    """
    if directory is not None:
        distributed.by_leader(lambda: WorkDirectory(directory).check_fit(config))
    with display.waiting("loading the data and making the model"):
        experiment = distributed.together(
            lambda: prepare(config, load_problem(problem_settings(config), shapes=True))
        )
    _show(experiment, display, chosen)


def run(config: Config, directory: Path, display: Display, chosen: Collection[str] = ()) -> None:
    """Runs, resumes or extends the run in a directory.

    With several processes each calls this, with a directory that all of them see; the leader
    alone writes to it, but for checkpoints, which they write together.

    Args:
      config: What to run.
      directory: Where everything is written; see `workdir.WorkDirectory`.
      display: Where progress is shown.
      chosen: Fields that the user set one by one; see `unused.ignored_settings`.

    Raises:
      ConfigError: The configuration is not possible, or the directory belongs to another one.
      OutOfMemoryError: The device ran out of memory; the last checkpoint stands.
      CheckpointError: The checkpoints in the directory cannot be read or written, or do not fit.
      FileError: The file system refuses another file, as a full disk does.
    """
    work = WorkDirectory(directory)
    distributed.by_leader(lambda: work.check(config))
    with display.waiting("loading the data and making the model"):
        experiment = distributed.together(lambda: prepare(config))
    run_in(work, experiment, display, chosen)


def run_in(
    work: WorkDirectory,
    experiment: Experiment,
    display: Display,
    chosen: Collection[str] = (),
    on_entries: OnEntries = lambda finished, entries: None,
) -> tuple[ServerState, list[Entry]]:
    """Runs, resumes or extends in a directory what is prepared.

    Args:
      work: The directory, which was checked.
      experiment: What `prepare` gave.
      display: Where progress is shown.
      chosen: Fields that the user set one by one; see `unused.ignored_settings`.
      on_entries: Called with the number of finished rounds, and what was newly evaluated.

    Returns:
      The last state, and everything that was evaluated, by earlier parts of the run too.

    Raises:
      ConfigError, OutOfMemoryError, CheckpointError: As `run` does.
    """
    config = experiment.config
    room = distributed.by_leader(lambda: _check_room(experiment, work))
    if room:
        display.warning(room)
    # It was chosen by the memory that each found on its own devices.
    at_once = experiment.simulation.choice.axis.chunk_size
    distributed.require_same("cohort.chunk_size = 0, so that each chose its own", str(at_once))
    with contextlib.ExitStack() as claim:
        distributed.by_leader(lambda: claim.enter_context(work.claim(config)))
        with told_as_file_error(work.path), _telling_what_remains(work):
            return _run(experiment, work, display, chosen, on_entries)
    raise RuntimeError("a claim suppresses nothing")


@contextlib.contextmanager
def _telling_what_remains(work: WorkDirectory) -> Iterator[None]:
    """Adds to what the file system refuses what a run that ends there leaves behind."""
    try:
        yield
    except (FileError, CheckpointError) as error:
        raise type(error)(f"{error}; {work.what_remains()}") from error


def _run(
    experiment: Experiment,
    work: WorkDirectory,
    display: Display,
    chosen: Collection[str],
    on_entries: OnEntries,
) -> tuple[ServerState, list[Entry]]:
    """The run in a directory that is ours alone."""
    config, settings = experiment.config, experiment.config.checkpoint
    stopped = threading.Event()
    with Checkpoints(work.checkpoints, settings.keep_latest, settings.keep_best) as checkpoints:
        restored = _restore(experiment, checkpoints)
        if restored is not None:
            rows = fingerprint(experiment.problem.splits)
            distributed.by_leader(lambda: work.check_rows(rows))
        display.message(f"{work.path}: only you may read it; it holds the hidden model")
        if restored is not None and _is_finished(restored, config, work):
            display.message(
                f"finished at round {config.rounds}; a larger --config.rounds would extend the run"
            )
            distributed.by_leader(lambda: _mend(work, restored[1], display))
            distributed.by_leader(lambda: _finish(experiment, work, *restored, display))
            return restored
        _show(experiment, display, chosen)
        chunk = experiment.simulation.choice.axis.chunk_size
        with answer_out_of_memory(config, chunk, lambda: _what_stands(checkpoints)):
            if restored is not None:
                state, history = restored
                display.message(f"resumed after round {int(state.round)}")
            else:
                if work.metrics.exists():
                    display.warning(
                        f"there is no checkpoint in {work.checkpoints}: the run starts again at "
                        f"round 1"
                    )
                problem = experiment.problem
                for line in first_steps(config):
                    display.message(line)
                with display.waiting("the server's own training"):
                    params = pretrain(
                        config,
                        problem.pretraining_apply,
                        problem.task,
                        problem.params,
                        experiment.private,
                        problem.preparation,
                    )
                    # Two processes' devices may round differently: the leader's is the model.
                    params = distributed.from_leader(params)
                    state = initial_state(experiment.simulation, params)
                display.message("every view is evaluated before the first round")
                with display.waiting("the first evaluation"):
                    history = [first_entry(experiment.simulation, state, experiment.held_out)]
            # Before and after the rounds neither waits: there is nothing more to be saved.
            with stopping_at(signal.SIGINT, stopped), stopping_at(signal.SIGTERM, stopped):
                state = _train(
                    experiment, state, history, work, checkpoints, display, stopped, on_entries
                )
    finished = int(state.round)
    if finished == config.rounds:
        distributed.by_leader(lambda: _finish(experiment, work, state, history, display))
    else:
        display.message(f"stopped after round {finished}; the same command resumes there")
    return state, history


def _is_finished(
    restored: tuple[ServerState, list[Entry]], config: Config, work: WorkDirectory
) -> bool:
    summarized = distributed.is_leader() and work.summary.exists()
    return int(restored[0].round) == config.rounds and distributed.any_of(summarized)


def prepare(config: Config, problem: Problem | None = None) -> Experiment:
    """Loads the data, initializes the model and composes the method; writes nothing.

    Args:
      config: What to run.
      problem: What `load_problem` returned for its `problem_settings`, if that was called.

    Raises:
      ConfigError: The configuration is not possible.
    """
    problem = problem or load_problem(problem_settings(config))
    simulation = make_simulation(
        config,
        problem.apply_fn,
        problem.task,
        problem.params,
        problem.splits.clients,
        problem.client_apply,
        size=problem.size,
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


def _check_room(experiment: Experiment, work: WorkDirectory) -> str | None:
    state = _state_shapes(experiment)
    return check_room(work.path, state, experiment.config.checkpoint, len(work.saved_rounds()))


def _state_shapes(experiment: Experiment) -> ServerState:
    """The server's state as shapes, from which nothing is computed."""
    key = root_key(experiment.config.seed)
    shapes: ServerState = jax.eval_shape(
        experiment.simulation.federation.init, key, experiment.problem.params
    )
    return shapes


def _what_stands(checkpoints: Checkpoints) -> str:
    latest = checkpoints.latest_round()
    if latest is None:
        return "no checkpoint was written yet"
    return f"the checkpoint of round {latest} stands"


def _restore(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[ServerState, list[Entry]] | None:
    """The latest checkpoint, if there is one, in its place."""

    def restore() -> tuple[ServerState, list[Entry]] | None:
        if checkpoints.latest_round() is None:
            return None
        return checkpoints.restore(_state_shapes(experiment))

    restored = distributed.together(restore)
    return restored and (place(experiment.simulation, restored[0]), restored[1])


def _train(
    experiment: Experiment,
    state: ServerState,
    history: list[Entry],
    work: WorkDirectory,
    checkpoints: Checkpoints,
    display: Display,
    stopped: threading.Event,
    on_entries: OnEntries,
) -> ServerState:
    """Runs the rounds that are left, adding to ``history``; returns the state after the last."""
    config, simulation = experiment.config, experiment.simulation
    splits = experiment.problem.splits
    score = f"global/{simulation.task.score}"
    metrics, board = MetricsFile(work.metrics), _board(work, display)
    finished = int(state.round)

    def begin() -> None:
        work.write_config(config)
        if finished == 0:
            work.write_rows(fingerprint(splits))
        work.keep_files(experiment.problem.files)
        metrics.rewrite(history)
        board.rewrite(history)

    def record(entries: list[Entry]) -> None:
        metrics.append(entries)
        board.append(entries)

    distributed.by_leader(begin)
    if finished == 0:
        checkpoints.save(0, state, history, history[-1][score])
        # What cannot be written is told before the first round, not after it.
        checkpoints.wait()
    calls = run_rounds(
        simulation,
        state,
        splits.clients,
        experiment.held_out,
        seconds=history[-1]["seconds"],
    )
    with (
        board,
        display.progress(config.rounds, finished, simulation.task.score) as progress,
    ):
        progress.update(finished, history[-1:])
        for after, state, entries in calls:
            history += entries
            progress.update(after, entries)
            on_entries(after, entries)
            # All stop at the same boundary, whichever of them was asked to.
            stop = distributed.any_of(stopped.is_set())
            every = config.checkpoint.every
            due = stop or after // every > finished // every or after == config.rounds
            distributed.by_leader(functools.partial(record, entries))
            checkpoints.raise_failure()
            if due:
                checkpoints.save(after, state, history, history[-1][score])
            finished = after
            if stop:
                break
    checkpoints.wait()
    return state


def _board(work: WorkDirectory, display: Display) -> TensorBoard:
    return TensorBoard(work.tensorboard, display.warning)


def _mend(work: WorkDirectory, history: list[Entry], display: Display) -> None:
    """Writes the metrics of a finished run again, where they are not what its checkpoint says."""
    metrics = MetricsFile(work.metrics)
    if not metrics.holds(history):
        display.warning(f"{work.metrics}: it is written again from the checkpoint's history")
        metrics.rewrite(history)
    if not any(work.tensorboard.glob("events.out.tfevents.*")):
        with _board(work, display) as board:
            board.rewrite(history)


def _finish(
    experiment: Experiment,
    work: WorkDirectory,
    state: ServerState,
    history: list[Entry],
    display: Display,
) -> None:
    """Writes and shows the final table, what the views wrote, and then the curves."""
    simulation, config = experiment.simulation, experiment.config
    score = simulation.task.score
    summary = summarize(history, _costs(experiment), history[-1]["seconds"], score)
    idle = [name for name, each in state.attackers.items() if not has_received(each)]
    summary["verdict"] = verdict(summary, config, idle)
    # Results first: nothing that comes later may cost them.
    write_json(work.summary, summary)
    texts = experiment.problem.texts
    if texts is not None:
        total = passes(simulation, state) * len(texts.prompts.texts)
        with display.steps("writing texts", total) as steps:
            summary["texts"] = write_texts(simulation, state, texts, work.texts, steps.add)
        write_json(work.summary, summary)
    display.final_table(summary)
    for line in warnings_after_run(config, history, state.attackers):
        display.warning(line)
    title = f"{config.algorithm} on {_data_name(experiment)}, seed {config.seed}"

    def draw() -> None:
        from fedqsn_jax.reporting import plots  # Slow to import, and only needed at the end.

        plots.accuracy_curves(history, work.picture, title, score)

    draw_safely(display, work.picture.name, draw)
    display.message(f"written to {work.path}")


def _show(experiment: Experiment, display: Display, chosen: Collection[str]) -> None:
    simulation, config = experiment.simulation, experiment.config
    clients = experiment.problem.splits.clients.clients
    display.message(
        f"{config.algorithm} on {_data_name(experiment)}: {clients} clients, "
        f"{config.cohort.size} a round, {config.rounds} rounds, seed {config.seed}, "
        f"{simulation.choice.reason}"
    )
    for line in warnings_before_run(config, chosen):
        display.warning(line)
    for note in experiment.problem.notes:
        display.message(note)
    display.overview(tensor_rows(simulation, experiment.problem.params), _costs(experiment))


def _data_name(experiment: Experiment) -> str:
    data = experiment.config.data
    own = data.task if data.name == "text" else data.name
    return experiment.problem.name or own


def _costs(experiment: Experiment) -> Costs:
    return expected_costs(experiment.simulation)
