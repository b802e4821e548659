"""The main job: data, the server's own training, rounds, checkpoints and reports."""

import contextlib
import functools
import signal
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import jax

from fedqsn_jax.config.schema import Config
from fedqsn_jax.core.keys import root_key
from fedqsn_jax.data.splits import fingerprint
from fedqsn_jax.host import distributed
from fedqsn_jax.host.atomic_files import FileError, told_as_file_error
from fedqsn_jax.host.checkpoints import CheckpointError, Checkpoints
from fedqsn_jax.problems.problem import problem_settings
from fedqsn_jax.problems.training import first_steps, pretrain
from fedqsn_jax.reporting.display import Display
from fedqsn_jax.reporting.writers import MetricsFile
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.runs.disk_space import check_room
from fedqsn_jax.runs.preparation import Experiment, load_problem, prepare
from fedqsn_jax.runs.reference import check_reference, reference_score
from fedqsn_jax.runs.results import mend_metrics, open_board, show_overview, write_results
from fedqsn_jax.runs.stopping import RunningRounds
from fedqsn_jax.runs.working_directory import WorkDirectory
from fedqsn_jax.simulation.memory import answer_out_of_memory
from fedqsn_jax.simulation.running import (
    Entry,
    first_entry,
    initial_state,
    place,
    run_rounds,
)

OnEntries = Callable[[int, list[Entry]], None]
"""Called with the number of finished rounds, and what was newly evaluated."""


def dry_run(
    config: Config, directory: Path | None, display: Display, chosen: Collection[str] = ()
) -> None:
    """Shows the model's tensors and mask sites, bytes and memory; trains and writes nothing.

    A run may be at work in the directory meanwhile.

    Args:
      config: What would run.
      directory: Where, if that is known.
      display: Where it is shown.
      chosen: Fields that the user set one by one; see `unused_settings.ignored_settings`.

    Raises:
      ConfigError: The run would be refused.
    """
    noise = None
    if directory is not None:
        distributed.by_leader(lambda: WorkDirectory(directory).check_fit(config))
        noise = WorkDirectory(directory).noise()
    with display.waiting("loading the data and making the model"):
        experiment = distributed.together(
            lambda: prepare(
                config,
                load_problem(problem_settings(config), shapes=True),
                noise,
                display.message,
            )
        )
    show_overview(experiment, display, chosen)


def run(
    config: Config,
    directory: Path,
    display: Display,
    chosen: Collection[str] = (),
    reference: Path | None = None,
) -> None:
    """Runs, resumes or extends the run in a directory.

    With several processes each calls this, with a directory that all of them see; the leader
    alone writes to it, but for checkpoints, which they write together.

    Args:
      config: What to run.
      directory: Where everything is written; see `working_directory.WorkDirectory`.
      display: Where progress is shown.
      chosen: Fields that the user set one by one; see `unused_settings.ignored_settings`.
      reference: The directory of a finished run of FedAvg, against which the benefit is measured.

    Raises:
      ConfigError: The configuration is not possible, the directory belongs to another one, or the
        reference is no such run.
      OutOfMemoryError: The device ran out of memory; the last checkpoint stands.
      CheckpointError: The checkpoints in the directory cannot be read or written, or do not fit.
      FileError: The file system refuses another file, as a full disk does.
    """
    work = WorkDirectory(directory)
    distributed.by_leader(lambda: work.check(config))
    if reference is not None:
        distributed.by_leader(lambda: check_reference(reference, config))
    noise = work.noise()
    with display.waiting("loading the data and making the model"):
        experiment = distributed.together(
            lambda: prepare(config, noise=noise, tell=display.message)
        )
    fedavg = None
    if reference is not None:
        # The leader alone writes results.
        score = experiment.problem.task.score
        rows = fingerprint(experiment.problem.splits)
        fedavg = distributed.by_leader(lambda: reference_score(reference, rows, score))
    run_in(work, experiment, display, chosen, fedavg=fedavg)


def run_in(
    work: WorkDirectory,
    experiment: Experiment,
    display: Display,
    chosen: Collection[str] = (),
    on_entries: OnEntries = lambda finished, entries: None,
    fedavg: float | None = None,
) -> tuple[ServerState, list[Entry]]:
    """Runs, resumes or extends in a directory what is prepared.

    Args:
      work: The directory, which was checked.
      experiment: What `prepare` gave.
      display: Where progress is shown.
      chosen: Fields that the user set one by one; see `unused_settings.ignored_settings`.
      on_entries: Called with the number of finished rounds, and what was newly evaluated.
      fedavg: The score that FedAvg reached, if it is known.

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
            return _run(experiment, work, display, chosen, on_entries, fedavg)
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
    fedavg: float | None,
) -> tuple[ServerState, list[Entry]]:
    """The run in a directory that is ours alone."""
    config, settings = experiment.config, experiment.config.checkpoint
    running = RunningRounds(work.what_remains)
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
            distributed.by_leader(lambda: mend_metrics(work, restored[1], display))
            distributed.by_leader(
                lambda: write_results(experiment, work, *restored, display, fedavg)
            )
            return restored
        show_overview(experiment, display, chosen)
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
            with running.stopping_at(signal.SIGINT), running.stopping_at(signal.SIGTERM):
                state = _train(
                    experiment, state, history, work, checkpoints, display, running, on_entries
                )
    finished = int(state.round)
    if finished == config.rounds:
        distributed.by_leader(
            lambda: write_results(experiment, work, state, history, display, fedavg)
        )
    else:
        display.message(f"stopped after round {finished}; the same command resumes there")
    return state, history


def _is_finished(
    restored: tuple[ServerState, list[Entry]], config: Config, work: WorkDirectory
) -> bool:
    summarized = distributed.is_leader() and work.summary.exists()
    return int(restored[0].round) == config.rounds and distributed.any_of(summarized)


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
    running: RunningRounds,
    on_entries: OnEntries,
) -> ServerState:
    """Runs the rounds that are left, adding to ``history``; returns the state after the last."""
    config, simulation = experiment.config, experiment.simulation
    splits = experiment.problem.splits
    score = f"global/{simulation.task.score}"
    metrics, board = MetricsFile(work.metrics), open_board(work, display)
    finished = int(state.round)

    def begin() -> None:
        work.write_config(config)
        # Without rounds none was found.
        if simulation.account is not None and config.rounds:
            work.write_noise(simulation.account.noise)
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
        stopping=running,
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
            # All stop after the same round, whichever of them was asked to.
            stop = running.is_asked()
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
