"""One call for people who bring their own model and their own clients' arrays."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.api.heads import Head, find_heads
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
from fedqsn_jax.config.schema import (
    Config,
    ConfigError,
    check_sections,
    chooses_scale,
    resolve,
    with_fields,
)
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import Task, classification
from fedqsn_jax.core.trees import exact_pattern, leaves_by_path, matches_any
from fedqsn_jax.core.types import ApplyFn, Batch, Params
from fedqsn_jax.data.held_out import hold_out
from fedqsn_jax.data.population import ClientData, HeldOut
from fedqsn_jax.data.streamed import HostData, place
from fedqsn_jax.problems.training import hold_back, pretrain
from fedqsn_jax.protocol.sites import parse_rule
from fedqsn_jax.reporting.display import Display, silent_display
from fedqsn_jax.reporting.summary import Costs, TensorRow
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.simulation.compose import Simulation, make_simulation
from fedqsn_jax.simulation.costs import expected_costs, tensor_rows
from fedqsn_jax.simulation.memory import answer_out_of_memory
from fedqsn_jax.simulation.running import (
    Entry,
    first_entry,
    initial_state,
    run_rounds,
)
from fedqsn_jax.simulation.warnings import warnings_after_run, warnings_before_run


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
    on_progress: Callable[[int, list[Entry]], None] | None = None,
    **settings: Any,
) -> Federated:
    """Federates a model of your own.

    Example::

      result = federate(
          MyModule(), clients, test, private=rows, rounds=20, p1=0.3, client={"steps": 20}
      )
      result.history[-1]["global/accuracy"] - result.history[-1]["attacker_10/accuracy"]

    The arrays are checked before anything is compiled. Settings that have no effect, promises that
    an algorithm does not keep, updates that were rejected because they were not finite, and
    training that diverged are told in a `UserWarning`.

    Args:
      model: A linen module, an nnx module, or ``(apply_fn, params)``. A module is called with
        ``batch[inputs]``, the function with ``(params, batch, key)``: the whole batch, and a key in
        training (for dropout), None in evaluation. How a module is told that it trains is said in
        `functional.linen_apply` and `functional.nnx_split`. The task head is found by what it
        does, and never hidden. Of parameters floating-point arrays are trained; integers, booleans
        and random keys are constants.
      clients: Each client's dictionary of arrays ``[rows, ...]``, all with the same names, dtypes
        and shapes of a row; numbers of rows may differ. Or all of them as `HostData`, whose arrays
        may be memory-mapped files.
      test: Held-out rows with the same names.
      private: The server's own rows, on which it trains before the first round
        (``pretraining`` in the settings); None: no such training.
      task: Loss and metrics; by default `tasks.classification` of the integers ``label``.
      params: Parameters to start from, instead of initial or an nnx module's own ones.
      inputs: The name of a module's input among the arrays.
      on_progress: Called with the number of finished rounds, and what was newly evaluated. Without
        it, what takes long gives signs of life: a line every few seconds, in a terminal a spinner.
      **settings: Fields of `config.Config`, sections as dictionaries. ``cohort.size`` and
        ``evaluation.attackers`` are by default at most the number of clients. Of ``data`` there
        are ``resident``, ``held_out_share`` and ``held_out_clients`` only.

    Raises:
      ConfigError: A setting is unknown, out of range, or does not fit the model.
      ValueError: The arrays are in another format or do not agree, a label is none of the model's
        classes, or the model has running statistics.
    """
    config, population, rows = _read(clients, test, private, settings)
    task = task or classification()
    check_names(model, inputs, task, population.examples)
    for line in warnings_before_run(config, _chosen(settings)):
        warnings.warn(line, stacklevel=2)
    prepared = _prepare(model, config, population, rows, task, params, inputs)
    state, history = _run(prepared, on_progress)
    for line in warnings_after_run(prepared.simulation.config, history, state.attackers):
        warnings.warn(line, stacklevel=2)
    simulation = prepared.simulation
    return Federated(
        prepared.tree.join(jax.jit(simulation.merged)(state.params)),
        history,
        tensor_rows(simulation, prepared.start),
        expected_costs(simulation),
        state,
        simulation,
    )


def _read(
    clients: Sequence[Arrays] | HostData,
    test: Arrays,
    private: Arrays | None,
    settings: Mapping[str, Any],
) -> tuple[Config, HostData, dict[str, Rows]]:
    """The settings, the clients' rows, and those of others by whose they are."""
    population = read_clients(clients)
    config = _resolve(settings, population.clients)
    others = {"test": test} if private is None else {"test": test, "private": private}
    rows = {where: read_rows(each, where) for where, each in others.items()}
    for where, each in rows.items():
        check_same(each, population, where)
    # What the settings say of private rows is of a data set of the package.
    own_rows = len(next(iter(rows["private"].values()))) if "private" in rows else 0
    return with_fields(config, {"data.private_rows": own_rows}), population, rows


class _Prepared(NamedTuple):
    """What is run.

    Attributes:
      apply_fn: The model, of nested dictionaries of parameters.
      tree: The form of the user's own parameters.
      start: The parameters before anybody trains.
      data: The clients' rows.
      private: The server's own rows to train on; None: none.
      held_out: What is evaluated on.
      simulation: The method, with the settings.
    """

    apply_fn: ApplyFn
    tree: OwnTree
    start: Params
    data: ClientData
    private: Batch | None
    held_out: HeldOut
    simulation: Simulation


def _prepare(
    model: OwnModel,
    config: Config,
    population: HostData,
    rows: Mapping[str, Rows],
    task: Task,
    params: Params | None,
    inputs: str,
) -> _Prepared:
    """Checks the model, and composes what is run; no program of the rounds is compiled."""
    some = {name: jnp.asarray(array[:_PROBE_ROWS]) for name, array in rows["test"].items()}
    example = {name: array[:1] for name, array in some.items()}
    key = root_key(config.seed)
    own_apply, initial = as_function(model, fold_in_name(key, "model"), example, inputs)
    start_of = initial if params is None else lambda: params
    outputs = outputs_of(own_apply, start_of, example)
    if task.label is not None:
        check_classes(task.label, outputs, population, rows)
    check_task(task, outputs, example)
    check_held(population, rows)
    tree, start = read_params(start_of())
    apply_fn = tree.adapt(own_apply)
    warn_of_idle_dropouts(model, tree.join(start), example, inputs)
    trains, client_tests = hold_out(
        population, config.data, np.random.default_rng([config.seed, _STREAM])
    )
    data = place(trains, config.data.resident)
    on_device: dict[str, Batch] = jax.tree.map(jnp.asarray, dict(rows))
    private, validation = _private(config, on_device)
    heads = find_heads(apply_fn, start, some, fold_in_name(key, "heads"))
    config = _with_heads(config, heads, start)
    return _Prepared(
        apply_fn=apply_fn,
        tree=tree,
        start=start,
        data=data,
        private=private,
        held_out=HeldOut(on_device["test"], client_tests, validation),
        simulation=make_simulation(config, apply_fn, task, start, data),
    )


def _run(
    prepared: _Prepared, on_progress: Callable[[int, list[Entry]], None] | None
) -> tuple[ServerState, list[Entry]]:
    """Runs all rounds; returns the last state and what was evaluated."""
    simulation, start = prepared.simulation, prepared.start
    config = simulation.config
    # Whoever is told of the rounds shows them in a way of their own.
    display = Display() if on_progress is None else silent_display()
    with (
        answer_out_of_memory(config, simulation.choice.axis.chunk_size),
        display.waiting("federate: the server's own training") as waiting,
    ):
        if prepared.private is not None:
            start = pretrain(config, prepared.apply_fn, simulation.task, start, prepared.private)
        state = initial_state(simulation, start)
        waiting.now("federate: the first evaluation")
        history = [first_entry(simulation, state, prepared.held_out)]
        waiting.now(f"federate: round 0 of {config.rounds}, the first call compiles")
        calls = run_rounds(simulation, state, prepared.data, prepared.held_out)
        for finished, after, entries in calls:
            waiting.now(f"federate: round {finished} of {config.rounds}")
            state = after
            history += entries
            if on_progress is not None:
                on_progress(finished, entries)
    return state, history


def _private(config: Config, rows: Mapping[str, Batch]) -> tuple[Batch | None, Batch | None]:
    """The server's rows to train on, and those on which settings are chosen; None: no rows."""
    if "private" in rows:
        return hold_back(config, rows["private"])
    if chooses_scale(config):
        raise ConfigError(
            "server.scale = 0: it is chosen on the server's own rows, and there are none; allowed "
            "are private=ROWS, or server.scale above 0"
        )
    return None, None


def _chosen(settings: Mapping[str, Any]) -> set[str]:
    """The dotted names of settings."""
    chosen = set()
    for name, value in settings.items():
        fields = value if isinstance(value, Mapping) else {"": None}
        chosen |= {f"{name}.{field}".rstrip(".") for field in fields}
    return chosen


def _with_heads(config: Config, heads: Sequence[Head], params: Params) -> Config:
    """Settings in which the model's heads are named: they are never hidden, whatever rules say.

    Raises:
      ConfigError: No head is known, though columns are hidden or quantized.
    """
    kernels = [head.kernel for head in heads]
    if not heads and not config.site_rules and config.algorithm != "fedavg":
        raise ConfigError(
            "site_rules: no task head was found; name it by a rule such as '=PATH: none', with a "
            f"path of: {', '.join(leaves_by_path(params))}"
        )
    try:
        rules = [(rule, *parse_rule(rule)) for rule in config.site_rules]
    except ValueError as error:
        raise ConfigError(f"site_rules: {error}") from error
    own = []
    for kernel in kernels:
        fitting = [roles for _, pattern, roles in rules if matches_any(kernel, (pattern,))]
        # A head that a rule quantizes and never hides travels so.
        if not fitting or fitting[0][0] not in ("none", "whole"):
            own.append(f"{exact_pattern(kernel)}: none")
    for rule, pattern, roles in rules:
        fits = [path for path in leaves_by_path(params) if matches_any(path, (pattern,))]
        if fits and set(fits) <= set(kernels) and roles[0] not in ("none", "whole"):
            warnings.warn(
                f"site_rules: {rule!r} has no effect: {', '.join(fits)} is the task head, which "
                f"is never hidden",
                stacklevel=4,
            )
    tensors = [path for head in heads for path in head if path is not None]
    patterns = [exact_pattern(path) for path in tensors] or ["head"]
    named = [patterns if name == "head" else [name] for name in config.client.trained]
    trained = tuple(itertools.chain(*named))
    client = dataclasses.replace(config.client, trained=trained)
    return dataclasses.replace(config, site_rules=(*own, *config.site_rules), client=client)


_DATA_FIELDS = {"resident", "held_out_share", "held_out_clients"}
_PROBE_ROWS = 64
_STREAM = 0x68656C64
"""Keeps the draws of held-out rows apart from others with the same seed."""


def _resolve(settings: Mapping[str, Any], population: int) -> Config:
    check_sections(settings)
    data = dict(settings.get("data", {}))
    held_out = data.get("held_out_clients", 0)
    if isinstance(held_out, int) and held_out < population:
        population -= held_out
    for section in ("data", "model", "checkpoint"):
        if section in settings and (section != "data" or set(data) - _DATA_FIELDS):
            raise ConfigError(f"{section}: of no use here, the model and the arrays are your own")
    cohort = {"size": min(Config().cohort.size, population), **settings.get("cohort", {})}
    attackers = tuple(sorted({min(n, population) for n in Config().evaluation.attackers}))
    evaluation = {"attackers": attackers, **settings.get("evaluation", {})}
    return resolve(
        {
            **settings,
            "cohort": cohort,
            "evaluation": evaluation,
            "data": {"clients": population, **data},
        }
    )
