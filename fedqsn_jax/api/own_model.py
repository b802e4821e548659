"""One call for people who bring their own model and their own clients' arrays."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from fedqsn_jax.api.heads import find_heads
from fedqsn_jax.api.own_function import (
    OwnModel,
    as_function,
    check_names,
    check_task,
    outputs_of,
    warn_of_idle_dropouts,
)
from fedqsn_jax.api.own_params import OwnTree, read_params
from fedqsn_jax.api.own_rows import (
    Arrays,
    Rows,
    check_classes,
    check_held,
    check_same,
    read_clients,
    read_rows,
)
from fedqsn_jax.api.own_settings import check_kinds, chosen_names, resolve_own, with_heads
from fedqsn_jax.api.own_targets import leave_out_idle_rows
from fedqsn_jax.config.paths import user_path
from fedqsn_jax.config.schema import (
    Config,
    ConfigError,
    chooses_scale,
    with_fields,
)
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import Task, classification
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import Batch, Params
from fedqsn_jax.data.held_out import hold_out
from fedqsn_jax.data.population import Splits
from fedqsn_jax.data.streamed import HostData, place
from fedqsn_jax.host.devices import computing
from fedqsn_jax.problems.limits import MODEL, check_initial
from fedqsn_jax.problems.problem import Problem
from fedqsn_jax.problems.training import pretrain
from fedqsn_jax.reporting.display import Display, silent_display
from fedqsn_jax.reporting.summary import Costs, TensorRow
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.runs.experiment import Experiment, OnEntries, prepare, run_in
from fedqsn_jax.runs.working_directory import WorkDirectory
from fedqsn_jax.simulation.compose import Simulation
from fedqsn_jax.simulation.costs import expected_costs, tensor_rows
from fedqsn_jax.simulation.memory import answer_out_of_memory
from fedqsn_jax.simulation.running import (
    Entry,
    first_entry,
    initial_state,
    run_rounds,
)
from fedqsn_jax.simulation.warnings import (
    warnings_after_run,
    warnings_before_run,
    weak_claims,
)


class Federated(NamedTuple):
    """What `federate` gives.

    Attributes:
      params: The trained hidden parameters; adapters are merged into their matrices.
      history: One entry an evaluated round, from round 0 on: ``round``, ``VIEW/METRIC`` for the
        views ``global``, ``server``, ``proxy`` and ``attacker_N``, training loss, bytes, seconds.
      tensors: The mask-site report: every tensor, and how it travels.
      costs: Expected bytes of a client in a round, and an estimate of memory.
      state: The server's whole state after the last round.
      simulation: What was run.
    """

    params: Params
    history: list[Entry]
    tensors: list[TensorRow]
    costs: Costs
    state: ServerState
    simulation: Simulation


def federate(
    model: OwnModel,
    clients: Sequence[Arrays] | HostData,
    test: Arrays,
    *,
    private: Arrays | None = None,
    task: Task | None = None,
    params: Params | None = None,
    inputs: str = "image",
    on_progress: OnEntries | None = None,
    workdir: Path | str | None = None,
    **settings: Any,
) -> Federated:
    """Federates a model of your own.

    Example::

      result = federate(
          MyModule(), clients, test, private=rows, rounds=20, p1=0.3, client={"steps": 20}
      )
      result.history[-1]["global/accuracy"] - result.history[-1]["attacker_10/accuracy"]

    The arrays are checked before anything is compiled. What the user should know of (settings
    without effect, promises that are not kept, rejected updates, divergence) is a `UserWarning`.

    Args:
      model: A linen module, an nnx module, or ``(apply_fn, params)``. A module is called with
        ``batch[inputs]`` (see `functional.linen_apply`, `functional.nnx_split`), the function with
        ``(params, batch, key)``: the whole batch, and a key in training, None in evaluation. The
        task head is found by what it does, and never hidden. Integers, booleans and random keys
        among the parameters are constants.
      clients: Each client's dictionary of arrays ``[rows, ...]``, all with the same names, dtypes
        and shapes of a row; numbers of rows may differ. Or all of them as `HostData`, whose arrays
        may be memory-mapped files.
      test: Held-out rows with the same names.
      private: The server's own rows, on which it trains before the first round
        (``pretraining`` in the settings); None: no such training.
      task: Loss and metrics; by default `tasks.classification` of the integers ``label``.
      params: Parameters to start from, instead of initial or an nnx module's own ones; also those
        that `load` gives.
      inputs: The name of a module's input among the arrays.
      on_progress: Called with the number of finished rounds, and what was newly evaluated. Without
        it, what takes long gives signs of life: a line every few seconds, in a terminal a spinner.
      workdir: A directory for checkpoints, metrics and pictures, as the main job has it: the same
        call resumes there, one with more ``rounds`` extends, `load` reads. None: nothing is kept.
      **settings: Fields of `settings.Config`, sections as dictionaries. ``cohort.size`` and
        ``evaluation.attackers`` are by default at most the number of clients. Of ``data`` there
        are ``resident``, ``held_out_share`` and ``held_out_clients`` only; ``checkpoint`` is for
        a ``workdir``.

    Raises:
      ConfigError: A setting is unknown, out of range, or does not fit the model, or the directory
        belongs to another configuration, other rows or another model.
      ValueError: The arrays are in another format or do not agree, a label is none of the model's
        classes, or the model has running statistics.
    """
    with computing():
        config, population, rows = _read(clients, test, private, settings, workdir)
        task = classification() if task is None else task
        check_kinds(task, on_progress, workdir)
        check_names(model, inputs, task, population.examples)
        lines = warnings_before_run(config, chosen_names(settings))
        for line in [*lines, *weak_claims(config, population.clients)]:
            warnings.warn(line, stacklevel=2)
        own = _Own(model, task, params, inputs)
        noise = None if workdir is None else WorkDirectory(user_path(workdir)).noise()
        tree, experiment = _prepare(own, config, population, rows, noise)
        if workdir is None:
            state, history = _run(experiment, on_progress)
        else:
            state, history = _run_in(user_path(workdir), experiment, on_progress)
        for line in warnings_after_run(experiment.config, history, state.attackers):
            warnings.warn(line, stacklevel=2)
        simulation = experiment.simulation
        return Federated(
            tree.join(jax.jit(simulation.merged)(state.params)),
            history,
            tensor_rows(simulation, experiment.problem.params),
            expected_costs(simulation),
            state,
            simulation,
        )


def _read(
    clients: Sequence[Arrays] | HostData,
    test: Arrays,
    private: Arrays | None,
    settings: Mapping[str, Any],
    workdir: Path | str | None,
) -> tuple[Config, HostData, dict[str, Rows]]:
    """The settings, the clients' rows, and those of others by whose they are."""
    population = read_clients(clients)
    config = resolve_own(settings, population.clients, workdir is not None)
    others = {"test": test} if private is None else {"test": test, "private": private}
    rows = {where: read_rows(each, where) for where, each in others.items()}
    for where, each in rows.items():
        check_same(each, population, where)
    # What the settings say of private rows is of a data set of the package.
    own_rows = len(next(iter(rows["private"].values()))) if "private" in rows else 0
    return with_fields(config, {"data.private_rows": own_rows}), population, rows


class _Own(NamedTuple):
    """What a user calls the model, and how it is used.

    Attributes:
      model: The model.
      task: What it is for.
      params: What it starts from; None: what it has, or its initial ones.
      inputs: The name of a module's input.
    """

    model: OwnModel
    task: Task
    params: Params | None
    inputs: str


def _prepare(
    own: _Own,
    config: Config,
    population: HostData,
    rows: Mapping[str, Rows],
    noise: float | None,
) -> tuple[OwnTree, Experiment]:
    """Checks the model, and composes what is run; no program of the rounds is compiled."""
    # What 32 bits cannot hold is refused below.
    with np.errstate(over="ignore"):
        some = {name: jnp.asarray(array[:_PROBE_ROWS]) for name, array in rows["test"].items()}
    example = {name: array[:1] for name, array in some.items()}
    key = root_key(config.seed)
    own_apply, initial = as_function(own.model, fold_in_name(key, "model"), example, own.inputs)
    given = None if own.params is None else _as_the_model_has(own, initial)
    start_of = initial if given is None else lambda: given
    outputs = outputs_of(own_apply, start_of, example)
    if own.task.label is not None:
        check_classes(own.task.label, outputs, population, rows)
    check_task(own.task, outputs, example)
    check_held(population, rows)
    population, rows = leave_out_idle_rows(own.task, outputs, population, rows)
    if isinstance(own.model, linen.Module) and own.params is None:
        check_initial(config, MODEL, jax.eval_shape(initial))
    tree, start = read_params(start_of())
    apply_fn = tree.adapt(own_apply)
    warn_of_idle_dropouts(own.model, tree.join(start), example, own.inputs)
    trains, client_tests = hold_out(
        population, config.data, np.random.default_rng([config.seed, _STREAM])
    )
    on_device: dict[str, Batch] = jax.tree.map(jnp.asarray, dict(rows))
    heads = find_heads(apply_fn, start, some, fold_in_name(key, "heads"))
    problem = Problem(
        splits=Splits(
            clients=place(trains, config.data.resident),
            private=_private(config, on_device),
            test=on_device["test"],
            num_classes=outputs.shape[-1] if outputs.shape else 0,
            client_tests=client_tests,
        ),
        params=start,
        apply_fn=apply_fn,
        pretraining_apply=apply_fn,
        client_apply=None,
        task=own.task,
        name="rows of your own",
    )
    return tree, prepare(with_heads(config, heads, start), problem, noise)


def _as_the_model_has(own: _Own, initial: Callable[[], Params]) -> Params:
    """Parameters to start from, in the form of the model's own: `load` gives dictionaries."""
    if not isinstance(own.model, tuple):
        return own.params
    first = initial()
    given, wanted = (str(jax.tree.structure(each)) for each in (own.params, first))
    if given == wanted:
        return own.params
    tree, plain = read_params(first)
    if given != str(jax.tree.structure(plain)):
        raise ValueError(f"params: {given}; allowed is the model's own structure, {wanted}")
    return tree.join(own.params)


def _run_in(
    directory: Path, experiment: Experiment, on_progress: OnEntries | None
) -> tuple[ServerState, list[Entry]]:
    """Runs, resumes or extends in a directory, as the main job does."""
    tensors = leaves_by_path(experiment.problem.params)
    described = (f"{path} {leaf.dtype}{list(leaf.shape)}" for path, leaf in tensors.items())
    work = WorkDirectory(directory, tuple(described))
    work.check(experiment.config)
    if on_progress is None:
        return run_in(work, experiment, Display())
    return run_in(work, experiment, silent_display(), on_entries=on_progress)


def _run(experiment: Experiment, on_progress: OnEntries | None) -> tuple[ServerState, list[Entry]]:
    """Runs all rounds; returns the last state and what was evaluated."""
    config, problem, simulation = experiment.config, experiment.problem, experiment.simulation
    # Whoever is told of the rounds shows them in a way of their own.
    display = Display() if on_progress is None else silent_display()
    with (
        answer_out_of_memory(config, simulation.choice.axis.chunk_size),
        display.waiting("federate: the server's own training") as waiting,
    ):
        start, private = problem.params, experiment.private
        start = pretrain(config, problem.apply_fn, problem.task, start, private)
        state = initial_state(simulation, start)
        waiting.now("federate: the first evaluation")
        history = [first_entry(simulation, state, experiment.held_out)]
        waiting.now(f"federate: round 0 of {config.rounds}, the first call compiles")
        calls = run_rounds(simulation, state, problem.splits.clients, experiment.held_out)
        for finished, after, entries in calls:
            waiting.now(f"federate: round {finished} of {config.rounds}")
            state = after
            history += entries
            if on_progress is not None:
                on_progress(finished, entries)
    return state, history


def _private(config: Config, rows: Mapping[str, Batch]) -> Batch:
    """The server's own rows; of none, arrays without rows."""
    if "private" in rows:
        return rows["private"]
    if chooses_scale(config):
        raise ConfigError(
            "server.scale = 0: it is chosen on the server's own rows, and there are none; allowed "
            "are private=ROWS, or server.scale above 0"
        )
    return {name: array[:0] for name, array in rows["test"].items()}


_PROBE_ROWS = 64
_STREAM = 0x68656C64
"""Keeps the draws of held-out rows apart from others with the same seed."""
