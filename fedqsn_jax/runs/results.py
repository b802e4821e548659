"""What a run shows and leaves: the overview, metrics for TensorBoard, the final table, pictures."""

from collections.abc import Collection
from typing import Any

from fedqsn_jax.host.atomic_files import FileError, told_as_file_error
from fedqsn_jax.reporting.display import Display, draw_safely
from fedqsn_jax.reporting.summary import (
    Costs,
    add_reference,
    add_trained_attackers,
    summarize,
)
from fedqsn_jax.reporting.verdict import verdict
from fedqsn_jax.reporting.writers import MetricsFile, TensorBoard, write_json
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.rounds.views import has_received
from fedqsn_jax.runs.preparation import Experiment
from fedqsn_jax.runs.working_directory import WorkDirectory
from fedqsn_jax.runs.written_texts import passes, write_texts
from fedqsn_jax.simulation.costs import expected_costs, tensor_rows
from fedqsn_jax.simulation.fine_tuned_attackers import train_attackers, trains_attackers
from fedqsn_jax.simulation.running import Entry
from fedqsn_jax.simulation.warnings import warnings_after_run, warnings_before_run, weak_claims


def open_board(work: WorkDirectory, display: Display) -> TensorBoard:
    """Returns TensorBoard's files of a run; what they cannot take is told and switches them off."""
    return TensorBoard(work.tensorboard, display.warning)


def mend_metrics(work: WorkDirectory, history: list[Entry], display: Display) -> None:
    """Writes the metrics of a finished run again, where they are not what its checkpoint says."""
    metrics = MetricsFile(work.metrics)
    if not metrics.holds(history):
        display.warning(f"{work.metrics}: it is written again from the checkpoint's history")
        metrics.rewrite(history)
    if not any(work.tensorboard.glob("events.out.tfevents.*")):
        with open_board(work, display) as board:
            board.rewrite(history)


def write_results(
    experiment: Experiment,
    work: WorkDirectory,
    state: ServerState,
    history: list[Entry],
    display: Display,
    fedavg: float | None = None,
) -> None:
    """Writes and shows the final table, what the views wrote, and then the curves.

    Args:
      experiment: What was run.
      work: Where.
      state: The state after the last round.
      history: Everything that was evaluated.
      display: Where it is shown.
      fedavg: The score of a FedAvg run, against which the benefit is measured, if one is known.
    """
    simulation, config = experiment.simulation, experiment.config
    score = simulation.task.score
    summary = summarize(history, _costs(experiment), history[-1]["seconds"], score)
    summary["privacy"] = simulation.account and simulation.account.told(int(state.round))
    if fedavg is not None:
        add_reference(summary, fedavg)
    idle = [name for name, each in state.attackers.items() if not has_received(each)]
    summary["verdict"] = verdict(summary, config, idle)
    # Results first: nothing that comes later may cost them.
    write_json(work.summary, summary)
    if trains_attackers(config):
        with display.waiting("colluders train on rows of their own"):
            _train_attackers(experiment, state, summary)
        summary["verdict"] = verdict(summary, config, idle)
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

    refused: list[FileError] = []

    def draw() -> None:
        from fedqsn_jax.reporting import plots  # Slow to import, and only needed at the end.

        try:
            with told_as_file_error(work.picture):
                plots.accuracy_curves(history, work.picture, title, score)
        except FileError as error:
            refused.append(error)

    draw_safely(display, work.picture.name, draw)
    if refused:
        # The results are written; that the disk takes no more is told all the same.
        raise refused[0]
    display.message(f"written to {work.path}")


def _train_attackers(experiment: Experiment, state: ServerState, summary: dict[str, Any]) -> None:
    problem, steps = experiment.problem, experiment.config.evaluation.fine_tuned_attackers
    found = train_attackers(
        experiment.simulation,
        state,
        problem.apply_fn,
        problem.client_apply,
        problem.splits.clients,
        problem.splits.test,
    )
    facts = {name: each._asdict() for name, each in found.items()}
    add_trained_attackers(summary, facts, steps)


def show_overview(experiment: Experiment, display: Display, chosen: Collection[str]) -> None:
    """Shows what is about to run, what to be warned of, and every tensor with its cost.

    Args:
      experiment: What is about to run.
      display: Where it is shown.
      chosen: Fields that the user set one by one.
    """
    simulation, config = experiment.simulation, experiment.config
    clients = experiment.problem.splits.clients.clients
    display.message(
        f"{config.algorithm} on {_data_name(experiment)}: {clients} clients, "
        f"{config.cohort.size} a round, {config.rounds} rounds, seed {config.seed}, "
        f"{simulation.choice.reason}"
    )
    for line in [*warnings_before_run(config, chosen), *weak_claims(config, clients)]:
        display.warning(line)
    if simulation.account is not None:
        display.message(simulation.account.line(config.rounds))
    for note in experiment.problem.notes:
        display.message(note)
    display.overview(tensor_rows(simulation, experiment.problem.params), _costs(experiment))


def _data_name(experiment: Experiment) -> str:
    data = experiment.config.data
    own = data.task if data.name == "text" else data.name
    return experiment.problem.name or own


def _costs(experiment: Experiment) -> Costs:
    return expected_costs(experiment.simulation)
