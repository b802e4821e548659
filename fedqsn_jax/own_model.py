"""One call for people who bring their own model and their own clients' arrays."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from fedqsn_jax.config import ClientConfig, Config, ConfigError, resolve
from fedqsn_jax.configured import root_key
from fedqsn_jax.costs import expected_costs, tensor_rows
from fedqsn_jax.data.federated import FederatedData, from_clients, join_clients
from fedqsn_jax.data.held_out import HeldOut, hold_out
from fedqsn_jax.data.streamed import HostData, place
from fedqsn_jax.heads import find_heads
from fedqsn_jax.masking import leaves_by_path
from fedqsn_jax.memory import answer_out_of_memory
from fedqsn_jax.models.adapters import linen_apply, linen_init, nnx_split
from fedqsn_jax.pretraining import pretrain
from fedqsn_jax.randomness import fold_in_name
from fedqsn_jax.reporting.summary import Costs, TensorRow
from fedqsn_jax.rounds import ServerState
from fedqsn_jax.running import Entry, first_entry, initial_state, run_rounds
from fedqsn_jax.simulation import Simulation, make_simulation
from fedqsn_jax.tasks import Task, classification
from fedqsn_jax.types import ApplyFn, Array, Params

Arrays = Mapping[str, Any]
"""Named arrays ``[rows, ...]``, NumPy's or JAX's."""


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

    Args:
      model: A linen module, an nnx module, or ``(apply_fn, params)``. A module is called with
        ``batch[inputs]``. Its task head is found by what it does, and never hidden.
      clients: Each client's named arrays ``[rows, ...]``; numbers of rows may differ. Or all of
        them as `HostData`, whose arrays may be memory-mapped files.
      test: Held-out rows with the same names.
      private: The server's own rows, on which it trains before the first round
        (``pretraining`` in the settings); None: no such training.
      task: Loss and metrics; by default `tasks.classification` of the integers ``label``.
      params: Parameters to start from, instead of initial or an nnx module's own ones.
      inputs: The name of the model's input.
      on_progress: Called with the number of finished rounds, and what was newly evaluated.
      **settings: Fields of `config.Config`, sections as dictionaries. ``cohort.size`` and
        ``evaluation.attackers`` are by default at most the number of clients. Of ``data`` there
        are ``resident``, ``held_out_share`` and ``held_out_clients`` only.

    Raises:
      ConfigError: A setting is unknown, out of range, or does not fit the model.
      ValueError: The arrays do not agree, or the model has running statistics.
    """
    if not isinstance(clients, HostData):
        arrays = [{name: np.asarray(a) for name, a in rows.items()} for rows in clients]
        clients = HostData(*join_clients(arrays))
    config = _resolve(settings, clients.clients)
    population, client_tests = hold_out(
        clients, config.data, np.random.default_rng([config.seed, _STREAM])
    )
    data = place(population, config.data.resident)
    rows = _checked(test, data, "test")
    held_out = HeldOut(rows, client_tests)
    example = {name: array[:1] for name, array in rows.items()}
    apply_fn, own_params = _as_function(model, config, example, inputs)
    start = own_params if params is None else jax.tree.map(jnp.asarray, params)
    task = task or classification()
    heads = find_heads(apply_fn, start, example, fold_in_name(root_key(config), "heads"))
    if not heads and not config.site_rules:
        raise ConfigError(
            "site_rules: no task head was found; name it by a rule such as 'PATH: none', with a "
            f"path of: {', '.join(leaves_by_path(start))}"
        )
    rules = (*config.site_rules, *(f"{path}: none" for path in heads))
    config = dataclasses.replace(config, site_rules=rules, client=_with_heads(config.client, heads))
    simulation = make_simulation(config, apply_fn, task, start, data)
    with answer_out_of_memory(config, simulation.choice.axis.chunk_size):
        if private is not None:
            rows = _checked(private, data, "private")
            start = pretrain(config, apply_fn, task, start, rows)
        state = initial_state(simulation, start)
        history = [first_entry(simulation, state, held_out)]
        for finished, after, entries in run_rounds(simulation, state, data, held_out):
            state = after
            history += entries
            if on_progress is not None:
                on_progress(finished, entries)
    return Federated(
        jax.jit(simulation.merged)(state.params),
        history,
        tensor_rows(simulation, start),
        expected_costs(simulation),
        state,
        simulation,
    )


def _checked(rows: Arrays, data: FederatedData | HostData, name: str) -> dict[str, Array]:
    """The rows on the device, once names, dtypes, shapes and numbers of rows agree."""
    joined = from_clients([{key: np.asarray(array) for key, array in rows.items()}]).examples
    ours = {key: (array.dtype, array.shape[1:]) for key, array in joined.items()}
    theirs = {
        key: (jax.dtypes.canonicalize_dtype(array.dtype), array.shape[1:])
        for key, array in data.examples.items()
    }
    if ours != theirs:
        raise ValueError(f"{name} has arrays {ours}, the clients have {theirs}")
    if not jax.tree.leaves(joined)[0].shape[0]:
        raise ValueError(f"{name} has no rows")
    return joined


def _with_heads(client: ClientConfig, heads: Sequence[str]) -> ClientConfig:
    """Replaces the name ``head`` by the model's heads, which need not be named so."""
    patterns = [f"{path.rpartition('/')[0]}/*".lstrip("/") for path in heads]
    named = [patterns if name == "head" else [name] for name in client.trained]
    return dataclasses.replace(client, trained=tuple(itertools.chain(*named)))


_DATA_FIELDS = {"resident", "held_out_share", "held_out_clients"}
_STREAM = 0x68656C64
"""Keeps the draws of held-out rows apart from others with the same seed."""


def _resolve(settings: Mapping[str, Any], population: int) -> Config:
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
) -> tuple[ApplyFn, Params]:
    if isinstance(model, tuple):
        return model
    if isinstance(model, linen.Module):
        key = fold_in_name(root_key(config), "model")
        return linen_apply(model, inputs), linen_init(model, key, dict(example), inputs)
    params, apply_fn = nnx_split(model, inputs)
    return apply_fn, params
