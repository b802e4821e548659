"""Running a simulation: its rounds, call by call, and what each evaluated round tells."""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.core.types import Array, Batch, Params
from fedqsn_jax.data.population import ClientData, HeldOut
from fedqsn_jax.data.streamed import HostData, capacity_for, stream
from fedqsn_jax.host import distributed
from fedqsn_jax.host.devices import Tree, replicate
from fedqsn_jax.protocol.sizes import Traffic
from fedqsn_jax.reporting.summary import EPSILON
from fedqsn_jax.rounds.calls import CallResult, draw_cohorts
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.simulation.compose import Simulation
from fedqsn_jax.simulation.scheduling import calls_of

Entry = dict[str, Any]
"""One evaluated round: what becomes a line of metrics.jsonl."""

_PIECE_SECONDS = 1.0
"""How long the host lets a call's rounds run before it looks whether it shall stop."""

_REMEMBERED = 20
"""Pieces by which the next one's number of rounds is set."""


class Stopping(Protocol):
    """Whoever may ask rounds to stop within a call, and is told of those that run."""

    def begins(self, finished: int, end: int) -> None:
        """Is told that rounds begin after so many, and will run up to ``end``."""

    def is_asked(self) -> bool:
        """Whether the rounds shall stop here; of several processes all have to say the same."""


class _NeverStopping:
    def begins(self, finished: int, end: int) -> None:
        pass

    def is_asked(self) -> bool:
        return False


class _Pace:
    """How many rounds run before the host looks again: at first one, then about a second's."""

    def __init__(self) -> None:
        self._compiled = False
        # Rounds that are evaluated may take much longer than others: the slowest of late counts.
        self._late: deque[float] = deque(maxlen=_REMEMBERED)

    def rounds(self, busy: float) -> int:
        """The number; of several processes the leader's, since all run the same program.

        Args:
          busy: Seconds that the host has work of its own meanwhile.
        """
        seconds = max(busy, _PIECE_SECONDS)
        count = min(seconds / max(*self._late, 1e-9), 2**30) if self._late else 1
        return int(distributed.from_leader(np.int32(max(count, 1))))

    def took(self, seconds: float, rounds: int) -> None:
        """Notes how long rounds took; the first ones compile, and say nothing."""
        if self._compiled:
            self._late.append(seconds / rounds)
        self._compiled = True


def place(simulation: Simulation, tree: Tree) -> Tree:
    """Puts a state or data where the simulation's calls want them; see `devices.replicate`."""
    return replicate(tree, simulation.choice.axis.mesh)


def initial_state(simulation: Simulation, params: Params) -> ServerState:
    """Returns the state before the first round, in its place; the parameters are copied."""
    init = jax.jit(simulation.federation.init)
    return place(simulation, init(federation_key(simulation.config.seed), params))


def first_entry(simulation: Simulation, state: ServerState, test: Batch | HeldOut) -> Entry:
    """Evaluates the state before the first round: an entry without training facts."""
    test = place(simulation, test)
    metrics = jax.device_get(jax.jit(simulation.federation.evaluate)(state, test))
    epsilon = {} if simulation.account is None else {EPSILON: 0.0}
    return {"round": 0, **_ordered(metrics), **epsilon, "seconds": 0.0}


def run_rounds(
    simulation: Simulation,
    state: ServerState,
    data: ClientData,
    test: Batch | HeldOut,
    *,
    seconds: float = 0.0,
    stopping: Stopping | None = None,
) -> Iterator[tuple[int, ServerState, list[Entry]]]:
    """Runs rounds up to the configured number, call by call.

    Calls end at multiples of ``rounds_per_call`` of the absolute round, so that an interrupted run
    and an uninterrupted one make the same calls. Within a call the compiled program is given about
    a second's rounds at a time, so that a run can stop soon; what it computes does not depend on
    that. A yielded state is donated to the next call: use it before asking for the next.

    Args:
      simulation: What to run.
      state: The state to start from, in its place (see `place`); it is donated.
      data: The clients' rows. Those of `HostData` are streamed: while the device works on a call,
        the rows of the next are gathered and sent.
      test: Held-out rows, also of clients.
      seconds: What earlier parts of the run took; entries count on from there.
      stopping: May stop the rounds within a call; nothing follows then.

    Yields:
      ``(round, state, entries)`` after each call, with the rounds evaluated in it.
    """
    config, stopping = simulation.config, stopping or _NeverStopping()
    calls = calls_of(int(state.round), config)
    test, last = place(simulation, (test, jnp.int32(config.rounds)))
    feed = _feed(simulation, state, data, calls)
    pace = _Pace()
    began = time.perf_counter()
    following, feeding = next(feed, None), 0.0
    for finished, stop in calls:
        rows, entries, after = following, [], finished
        while after < stop and not (after > finished and stopping.is_asked()):
            busy = feeding if after == finished else 0.0
            before, after = after, min(stop, after + pace.rounds(busy))
            stopping.begins(before, after)
            until = place(simulation, jnp.int32(after))
            state, result = simulation.run(state, rows, test, until, last)
            if before == finished:
                # The call runs on while the host prepares the next one's rows.
                feeding = time.perf_counter()
                following = next(feed, None)
                feeding = time.perf_counter() - feeding
            result = jax.device_get(result)
            took = time.perf_counter() - began
            pace.took(took, after - before)
            for index in np.flatnonzero(result.evaluated[: after - before]):
                share = (index + 1) / (after - before)
                entry = entry_of(simulation, result, int(index), before)
                entries.append({**entry, "seconds": round(float(seconds + share * took), 6)})
            seconds += took
            began = time.perf_counter()
        yield after, state, entries
        if after < stop:
            return
        began = time.perf_counter()


def entry_of(simulation: Simulation, result: CallResult, index: int, finished: int) -> Entry:
    """Returns what one evaluated round of a call tells.

    That is its number, metrics, the training loss, how many clients returned an update and whose
    were rejected, bytes, means over the sampled clients, and epsilon of all rounds so far. In
    one-way rounds some have already what they would be sent: there bytes down are means over all
    rounds so far.

    Args:
      simulation: The method, whose payloads are counted.
      result: What the call brought to the host.
      index: The round's place in it.
      finished: Number of rounds that were finished before the call.
    """
    number, traffic = finished + index + 1, simulation.traffic
    facts = {name: values[index] for name, values in result.facts.items()}
    mean_size = simulation.config.cohort.size
    # Of a Poisson cohort that is empty there are no means.
    cohort = max(int(facts.get("clients/drawn", mean_size)), 1)
    drawn = mean_size * number if "payloads" in facts else cohort
    counts = {
        name: int(facts[f"clients/{name}"])
        for name in ("drawn", "sent", "returned", "rejected")
        if f"clients/{name}" in facts
    }
    returned = counts["returned"] / cohort
    epsilon = {} if simulation.account is None else {EPSILON: simulation.account.epsilon(number)}
    return {
        "round": number,
        **_ordered({name: values[index] for name, values in result.metrics.items()}),
        "train/loss": float(facts["train/loss"]),
        **{f"clients/{name}": count for name, count in counts.items()},
        "bytes/down_per_client": mean_download(traffic, facts, drawn),
        "bytes/up_per_client": traffic.up.of(_columns(facts, "returned", cohort), returned),
        **epsilon,
    }


def mean_download(traffic: Traffic, facts: Mapping[str, Array], drawn: int) -> float:
    """Returns the mean bytes that a client was sent.

    Args:
      traffic: The lengths of payloads.
      facts: Of `Federation.round`: of the round, or in one-way rounds of all so far.
      drawn: How many clients took part, in that round or in all of them.
    """
    payloads = _count(facts["payloads"]) / drawn if "payloads" in facts else 1
    return traffic.down.of(_columns(facts, "visible", drawn), payloads)


def _columns(facts: Mapping[str, Array], kind: str, clients: int) -> dict[str, float]:
    of_kind = (name for name in facts if name.startswith(f"{kind}/"))
    return {name.partition("/")[2]: _count(facts[name]) / clients for name in of_kind}


def _count(value: Array) -> int:
    """A count of one round, or one of all rounds in two words; see `BroadcastState`."""
    return int(value) if value.ndim == 0 else (int(value[0]) << 32) + int(value[1])


def _feed(
    simulation: Simulation, state: ServerState, data: ClientData, calls: list[tuple[int, int]]
) -> Iterator[ClientData]:
    """The rows for one call after the other."""
    if not isinstance(data, HostData):
        yield from itertools.repeat(place(simulation, data), len(calls))
        return
    cohorts = draw_cohorts(simulation.federation, state, simulation.config.rounds)
    # Of all the run's calls, so that a run that was interrupted goes on with the same program.
    every_call = [cohorts[start:stop] for start, stop in calls_of(0, simulation.config)]
    capacity = capacity_for(data, every_call)
    for start, stop in calls:
        yield place(simulation, stream(data, cohorts[start:stop], capacity))


def _ordered(metrics: dict[str, Any]) -> dict[str, float]:
    """Puts the views in the order in which people read them; jitted functions sort by name."""
    views = ["global", "server", "proxy"]
    rank = {view: position for position, view in enumerate(views)}

    def place(name: str) -> tuple[str, int, int, str]:
        *group, view, metric = name.rsplit("/", 2)
        digits = "".join(filter(str.isdigit, view))
        return "/".join(group), rank.get(view, len(views)), int(digits or 0), metric

    return {name: float(metrics[name]) for name in sorted(metrics, key=place)}
