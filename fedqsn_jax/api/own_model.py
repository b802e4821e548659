"""One call for people who bring their own model and their own clients' arrays."""

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from fedqsn_jax.api.heads import find_heads
from fedqsn_jax.api.own_rows import Arrays, check_classes, check_same, read_clients, read_rows
from fedqsn_jax.config.command_line import one_line
from fedqsn_jax.config.schema import (
    ClientConfig,
    Config,
    ConfigError,
    check_sections,
    chooses_scale,
    resolve,
    with_fields,
)
from fedqsn_jax.core.keys import fold_in_name, root_key
from fedqsn_jax.core.tasks import Task, classification
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Params
from fedqsn_jax.data.held_out import hold_out
from fedqsn_jax.data.population import HeldOut
from fedqsn_jax.data.streamed import HostData, place
from fedqsn_jax.models.functional import linen_apply, linen_init, nnx_split
from fedqsn_jax.problems.training import hold_back, pretrain
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
    model: linen.Module | nnx.Module | tuple[ApplyFn, Params],
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
        training (for dropout), None in evaluation. The task head is found by what it does, and
        never hidden.
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
    population = read_clients(clients)
    config = _resolve(settings, population.clients)
    others = {"test": test} if private is None else {"test": test, "private": private}
    rows = {where: read_rows(each, where) for where, each in others.items()}
    for where, each in rows.items():
        check_same(each, population, where)
    # What the settings say of private rows is of a data set of the package.
    own_rows = len(next(iter(rows["private"].values()))) if "private" in rows else 0
    config = with_fields(config, {"data.private_rows": own_rows})
    task = task or classification()
    _check_names(model, inputs, task, population.examples)
    example = {name: jnp.asarray(array[:1]) for name, array in rows["test"].items()}
    apply_fn, initial = _as_function(model, config, example, inputs)
    start_of = initial if params is None else lambda: jax.tree.map(jnp.asarray, params)
    outputs = _outputs(apply_fn, start_of, example)
    if task.label is not None:
        check_classes(task.label, outputs, population, rows)
    _check_task(task, outputs, example)
    for line in warnings_before_run(config, _chosen(settings)):
        warnings.warn(line, stacklevel=2)
    trains, client_tests = hold_out(
        population, config.data, np.random.default_rng([config.seed, _STREAM])
    )
    data = place(trains, config.data.resident)
    on_device: dict[str, Batch] = jax.tree.map(jnp.asarray, rows)
    private_rows, validation = _private(config, on_device)
    held_out = HeldOut(on_device["test"], client_tests, validation)
    start = start_of()
    heads = find_heads(apply_fn, start, example, fold_in_name(root_key(config.seed), "heads"))
    if not heads and not config.site_rules:
        raise ConfigError(
            "site_rules: no task head was found; name it by a rule such as 'PATH: none', with a "
            f"path of: {', '.join(leaves_by_path(start))}"
        )
    rules = (*config.site_rules, *(f"{path}: none" for path in heads))
    config = dataclasses.replace(config, site_rules=rules, client=_with_heads(config.client, heads))
    simulation = make_simulation(config, apply_fn, task, start, data)
    # Whoever is told of the rounds shows them in a way of their own.
    display = Display() if on_progress is None else silent_display()
    with (
        answer_out_of_memory(config, simulation.choice.axis.chunk_size),
        display.waiting("federate: the server's own training") as waiting,
    ):
        if private_rows is not None:
            start = pretrain(config, apply_fn, task, start, private_rows)
        state = initial_state(simulation, start)
        waiting.now("federate: the first evaluation")
        history = [first_entry(simulation, state, held_out)]
        waiting.now(f"federate: round 0 of {config.rounds}, the first call compiles")
        for finished, after, entries in run_rounds(simulation, state, data, held_out):
            waiting.now(f"federate: round {finished} of {config.rounds}")
            state = after
            history += entries
            if on_progress is not None:
                on_progress(finished, entries)
    for line in warnings_after_run(config, history, state.attackers):
        warnings.warn(line, stacklevel=2)
    return Federated(
        jax.jit(simulation.merged)(state.params),
        history,
        tensor_rows(simulation, start),
        expected_costs(simulation),
        state,
        simulation,
    )


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


def _check_names(model: Any, inputs: str, task: Task, arrays: Mapping[str, Any]) -> None:
    """Makes sure that the rows have the arrays that are read by name."""
    names = ", ".join(sorted(arrays))
    if inputs not in arrays and not isinstance(model, tuple):
        raise ValueError(
            f"inputs = {inputs!r}: the model's input; allowed is one of the rows' {names}"
        )
    if task.label is not None and task.label not in arrays:
        raise ValueError(
            f"task: its labels are called {task.label!r}; allowed is one of the rows' {names}, by "
            f"task=classification(NAME)"
        )


def _outputs(
    apply_fn: ApplyFn, start: Callable[[], Params], example: Batch
) -> jax.ShapeDtypeStruct:
    """What the model makes of a batch; nothing is computed or compiled."""
    try:
        outputs: Any = jax.eval_shape(lambda batch: apply_fn(start(), batch, None), example)
    except KeyError as error:
        raise ValueError(
            f"model: there is no {error} in its parameters, or in a batch, which has "
            f"{', '.join(sorted(example))}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"model: it fails on a batch, which is a dictionary with "
            f"{', '.join(sorted(example))}, without a key, "
            f"as in evaluation: {one_line(error)}"
        ) from error
    if not isinstance(outputs, jax.ShapeDtypeStruct):
        raise ValueError(
            f"model: it returns a value of type {type(outputs).__name__}; allowed is one array"
        )
    return outputs


def _check_task(task: Task, outputs: jax.ShapeDtypeStruct, example: Batch) -> None:
    """Makes sure that the task finds in a batch what it reads."""

    def read(outputs: Array, batch: Batch, valid: Array) -> Any:
        return task.loss(outputs, batch, valid), task.statistics(outputs, batch, valid)

    try:
        jax.eval_shape(read, outputs, example, jnp.ones(1, bool))
    except KeyError as error:
        raise ValueError(
            f"task: there is no {error} in a batch, which has {', '.join(sorted(example))}"
        ) from error


def _chosen(settings: Mapping[str, Any]) -> set[str]:
    """The dotted names of settings."""
    chosen = set()
    for name, value in settings.items():
        fields = value if isinstance(value, Mapping) else {"": None}
        chosen |= {f"{name}.{field}".rstrip(".") for field in fields}
    return chosen


def _with_heads(client: ClientConfig, heads: Sequence[str]) -> ClientConfig:
    """Replaces the name ``head`` by the model's heads, which need not be named so."""
    patterns = [f"{path.rpartition('/')[0]}/*".lstrip("/") for path in heads]
    named = [patterns if name == "head" else [name] for name in client.trained]
    return dataclasses.replace(client, trained=tuple(itertools.chain(*named)))


_DATA_FIELDS = {"resident", "held_out_share", "held_out_clients"}
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


def _as_function(
    model: linen.Module | nnx.Module | tuple[ApplyFn, Params],
    config: Config,
    example: Arrays,
    inputs: str,
) -> tuple[ApplyFn, Callable[[], Params]]:
    """Returns the model as a function, and what makes its parameters.

    Raises:
      ValueError: It is none of the kinds of model, or its function has other arguments.
    """
    if isinstance(model, linen.Module):
        module, key = model, fold_in_name(root_key(config.seed), "model")
        return (
            linen_apply(module, inputs),
            lambda: linen_init(module, key, dict(example), inputs),
        )
    if isinstance(model, nnx.Module):
        own, apply_fn = nnx_split(model, inputs)
        return apply_fn, lambda: own
    if not isinstance(model, tuple) or len(model) != 2 or not callable(model[0]):
        kind = "the class" if isinstance(model, type) else "of type"
        name = (model if isinstance(model, type) else type(model)).__name__
        raise ValueError(
            f"model: {kind} {name}; allowed are an instance of a flax.linen or flax.nnx module, "
            f"and (apply_fn, params)"
        )
    apply_fn, own = model
    _check_signature(apply_fn)
    return apply_fn, lambda: own


def _check_signature(apply_fn: Callable[..., Any]) -> None:
    """Makes sure that a function can be called as the rounds will."""
    try:
        signature = inspect.signature(apply_fn)
    except (TypeError, ValueError):
        return  # Some callables do not tell; they are taken as they are.
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            f"model: apply_fn takes {signature}; allowed is (params, batch, key), where the batch "
            f"is a dictionary of arrays and the key None in evaluation"
        ) from error
