"""One compiled program for all points of a sweep that differ in values only.

Its arguments are the probabilities and rates (`compose.TRACEABLE`), and what a seed fixes: keys,
rows and initial parameters. Several points may go through it side by side, by ``vmap``.

On a CPU points run one after the other: the arithmetic of one keeps it busy. Side by side they were
measured as fast (ten rounds of digits: 0.63 s a point by fours, 0.67 s in turn), took nearly twice
as long to compile, and are all lost together in an interruption. Elsewhere as many are put side by
side as fill the device and fit; that has not been measured.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import Config, with_fields
from fedqsn_jax.core.trees import tree_bytes
from fedqsn_jax.core.types import Array, Key, Params
from fedqsn_jax.data.population import ClientData, FederatedData, HeldOut
from fedqsn_jax.data.streamed import HostData
from fedqsn_jax.host.devices import device_bytes
from fedqsn_jax.problems.problem import Problem
from fedqsn_jax.rounds.calls import CallResult
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.runs.experiment import Experiment
from fedqsn_jax.simulation.compose import Simulation
from fedqsn_jax.simulation.running import Entry, entry_of, place, run_rounds
from fedqsn_jax.simulation.scheduling import STEP_BYTES, calls_of
from fedqsn_jax.sweeps.grid import arguments_of
from fedqsn_jax.sweeps.sources import Start

_COPIES = 2
"""What a point takes side by side with others, in terms of the estimate for a run of its own: the
loop over clients then ends point by point and selects its carry, old or new. Compiled for a CPU, an
MLP with AdamW took 2.0 times the estimate, a tiny BERT 1.25 times."""

Arguments = dict[str, Array]
"""Values of `TRACEABLE` fields by name, float32 scalars (or ``[points]``)."""


class Program:
    """The compiled functions of one group of points."""

    def __init__(self, experiment: Experiment) -> None:
        """Composes the program; it is compiled when it is first used.

        Args:
          experiment: Of any point of the group.
        """
        self.simulation = experiment.simulation
        self._init, self._advance = jax.jit(self._init_one), _donating(self._advance_one)
        self._init_all = jax.jit(jax.vmap(self._init_one, out_axes=_state_axes(0)))
        # The number of the round is the same for all: evaluations stay conditional, not selected.
        axes = (0, _state_axes(0), 0, 0, None, None)
        self._advance_all = _donating(
            jax.vmap(self._advance_one, in_axes=axes, out_axes=(_state_axes(0), 0))
        )

    def run_one(self, config: Config, start: Start) -> Iterator[tuple[int, ServerState, Entry]]:
        """Runs one point, call by call.

        Yields:
          The number of finished rounds, the state (it is donated to the next call), and what the
          latest evaluation told.
        """
        arguments = _arrays(config)
        simulation = self.simulation.recompose(config)._replace(
            run=functools.partial(self._advance, arguments)
        )
        state = place(simulation, self._init(arguments, start.key, start.params))
        latest: Entry = {}
        for finished, after, entries in run_rounds(simulation, state, start.data, start.test):
            latest = entries[-1] if entries else latest
            yield finished, after, latest

    def run_all(
        self, configs: Sequence[Config], starts: Sequence[Start]
    ) -> Iterator[tuple[int, ServerState, list[Entry]]]:
        """Runs several points side by side, as `run_one` does each; a state's leaves are stacked.

        Args:
          configs: The points.
          starts: What each one's seed fixes.
        """
        stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
        arguments = stack(*map(_arrays, configs))
        keys = jnp.stack([start.key for start in starts])
        params, data, test = (
            stack(*_of_one_length([getattr(start, name) for start in starts]))
            for name in ("params", "data", "test")
        )
        simulations = [self.simulation.recompose(config) for config in configs]
        state = self._init_all(arguments, keys, params)
        latest: list[Entry] = [{} for _ in configs]
        last = jnp.int32(configs[0].rounds)
        for finished, stop in calls_of(0, configs[0]):
            state, result = self._advance_all(arguments, state, data, test, jnp.int32(stop), last)
            result = jax.device_get(result)
            for place_, simulation in enumerate(simulations):
                own = jax.tree.map(lambda leaf, place_=place_: leaf[place_], result)
                for index in np.flatnonzero(own.evaluated[: stop - finished]):
                    latest[place_] = entry_of(simulation, own, int(index), finished)
            yield stop, state, latest

    def _with(self, arguments: Arguments) -> Simulation:
        return self.simulation.recompose(with_fields(self.simulation.config, arguments))

    def _init_one(self, arguments: Arguments, key: Key, params: Params) -> ServerState:
        return self._with(arguments).federation.init(key, params)

    def _advance_one(
        self,
        arguments: Arguments,
        state: ServerState,
        data: ClientData,
        test: HeldOut,
        stop: Array,
        last: Array,
    ) -> tuple[ServerState, CallResult]:
        return self._with(arguments).run(state, data, test, stop, last)


def _of_one_length(trees: Sequence[Any]) -> list[Any]:
    """Adds rows that belong to no client, so that the clients' rows of all seeds can be stacked.

    How many rows are held out of a client's is rounded, so their sum differs between seeds.
    """

    def is_rows(node: Any) -> bool:
        return isinstance(node, FederatedData)

    def pad(first: Any, *others: Any) -> Any:
        if not is_rows(first):
            return first
        length = max(array.shape[0] for one in (first, *others) for array in one.examples.values())

        def longer(array: Array) -> Array:
            return jnp.pad(array, [(0, length - array.shape[0]), *[(0, 0)] * (array.ndim - 1)])

        return dataclasses.replace(first, examples=jax.tree.map(longer, first.examples))

    return [jax.tree.map(pad, tree, *trees, is_leaf=is_rows) for tree in trees]


def _state_axes(axis: int) -> Any:
    """Where the points' axis is in a stacked state; the number of the round is common to all."""
    fields: dict[str, Any] = {field.name: axis for field in dataclasses.fields(ServerState)}
    return ServerState(**{**fields, "round": None})


def state_of(stacked: ServerState, place_: int) -> ServerState:
    """Returns one point's state out of those of `Program.run_all`."""
    fields = {
        field.name: getattr(stacked, field.name)
        if field.name == "round"
        else jax.tree.map(lambda leaf: leaf[place_], getattr(stacked, field.name))
        for field in dataclasses.fields(ServerState)
    }
    return ServerState(**fields)


def _donating(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, donate_argnums=1)


def _arrays(config: Config) -> Arguments:
    return {name: jnp.float32(value) for name, value in arguments_of(config).items()}


def may_be_side_by_side(simulation: Simulation, data: ClientData) -> bool:
    """Whether several points can run at once: not with a mesh, nor with rows on the host."""
    return simulation.choice.axis.mesh is None and not isinstance(data, HostData)


def settings_at_once(simulation: Simulation, problem: Problem, points: int, platform: str) -> int:
    """How many points of a group are put side by side.

    Args:
      simulation: The group's.
      problem: Its model, and the rows that every point has a copy of.
      points: Points of the group.
      platform: JAX's name of the device kind, for example ``cpu``.
    """
    if platform == "cpu" or not may_be_side_by_side(simulation, problem.splits.clients):
        return 1
    # Parameters that a point starts from, and held-out rows, are not in the estimate of a run.
    own = tree_bytes((problem.params, problem.splits.test, problem.splits.client_tests))
    fit = device_bytes() // (_COPIES * sum(simulation.memory.values()) + own)
    fill = math.ceil(STEP_BYTES / max(simulation.choice.step_bytes, 1))
    return max(1, min(points, fit, fill))
