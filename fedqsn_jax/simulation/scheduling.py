"""How a run is scheduled: rounds in calls, and a round's clients side by side.

How many clients stand side by side is chosen from the device, the model's size, the memory that is
free, and how long they keep the device busy. A chunk has places in which clients of different
lengths train; after every step of all places some that became free are refilled (see
`client_axis`). Few places take many steps for a round, and each step costs its launches; many
places stand empty while the longest client trains on. Refilling few places after a step lets the
others wait, refilling many costs time in every step, needed or not. None of it depends on what
clients compute, so a round is played through with numbers of steps alone, for several candidates,
and the cheapest is taken.

The costs were fitted on an H200 (JAX 0.11.2, 2026-11-25) to rounds of 100, 1,000 and 10,000 clients
with 50 to 1,064 places. Among rounds of one size they agree with what was measured to 5%, between
sizes to 11%; but for one choice, a sixth slower, for which the compiler had made a bad kernel.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fedqsn_jax.config.schema import CohortConfig, Config, ConfigError
from fedqsn_jax.rounds.client_axis import CLIENTS_AXIS, ClientAxis

STEP_BYTES = 2**31
"""What a step of a chunk should move at least on a GPU or TPU, so that the launches of its kernels
do not count: more clients at once than that gain nothing."""

LAUNCH_BYTES = 3 * 2**26
"""What a device moves in the time that the launches of a step's kernels take."""

_ROOM = (1.0, 1.25, 1.5, 2.0, 3.0)
"""Candidates for the places to refill after a step, by how many become free on average."""

_LONGEST_PLAY = 16
"""Clients a place, beyond which a round is not played through, but reckoned in proportion."""

_FINEST = 32
"""Steps of the longest client, beyond which several are played as one."""


class Schedule(NamedTuple):
    """How clients stand side by side.

    Attributes:
      places: Clients at once.
      refills: Places that may be refilled after a step.
      turns: Steps of all places that a round is expected to take.
    """

    places: int
    refills: int
    turns: int


_ONE_BY_ONE = Schedule(1, 1, 0)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a choice depends on.

    Attributes:
      steps: Local steps of clients of the population (a sample of them is enough), int ``[n]``.
      equal_steps: The number of steps, if it is the same for all clients with rows; otherwise 0.
      client_bytes: What one more client of a chunk takes; see `memory.client_bytes`.
      arrival_bytes: What the parameters take that a client trains, or has in its own way.
      fixed_bytes: What a device holds whatever the chunk.
      device_bytes: What a device has.
    """

    steps: np.ndarray
    equal_steps: int
    client_bytes: int
    arrival_bytes: int
    fixed_bytes: int
    device_bytes: int

    @property
    def largest_chunk(self) -> int:
        """The most clients at once that fit, by the estimate; below 1 if none does."""
        return (self.device_bytes - self.fixed_bytes) // max(self.client_bytes, 1)


@dataclasses.dataclass(frozen=True)
class ClientAxisChoice:
    """How a cohort is run, and why.

    Attributes:
      axis: The strategy.
      reason: A line for people.
      step_bytes: What a step of all clients that a device trains at once moves, by the estimate.
    """

    axis: ClientAxis
    reason: str
    step_bytes: int = 0


def choose_client_axis(config: CohortConfig, workload: Workload, platform: str) -> ClientAxisChoice:
    """Turns the configured strategy into a `ClientAxis`.

    ``auto`` takes all devices. On a CPU it trains one client after the other, which was measured 5
    times faster with unequal clients; elsewhere so many side by side that a round costs least
    (`choose_schedule`), that a step does more than fill the device (`STEP_BYTES`), and that they
    fit.

    Args:
      config: The settings.
      workload: What the choice depends on.
      platform: JAX's name of the device kind, for example ``cpu``.

    Raises:
      ConfigError: There are not so many devices, or the chunk does not fit.
    """
    available = jax.device_count()
    if config.devices > available:
        raise ConfigError(
            f"cohort.devices = {config.devices}: allowed is at most the number of devices, "
            f"{available}"
        )
    wants_mesh = config.parallelism == "mesh" or (
        config.parallelism == "auto" and (available > 1 or config.devices > 1)
    )
    devices = (config.devices or available) if wants_mesh else 1
    if jax.process_count() > 1 and devices != available:
        setting = (
            f"cohort.devices = {devices}"
            if wants_mesh
            else f"cohort.parallelism = {config.parallelism!r}"
        )
        raise ConfigError(
            f"{setting}: with several processes all {available} devices take part, allowed are "
            f"auto or mesh with cohort.devices = 0 or {available}"
        )
    share = -(-config.size // devices)
    schedule, why = _places(config, workload, platform, share)
    chunk = schedule.places
    if chunk > max(workload.largest_chunk, 1):
        raise ConfigError(
            f"cohort.chunk_size = {chunk}: needs about "
            f"{_gib(workload.fixed_bytes + chunk * workload.client_bytes)} a device, which has "
            f"{_gib(workload.device_bytes)}; the largest that fits is "
            f"{max(workload.largest_chunk, 1)}"
        )
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (CLIENTS_AXIS,)) if wants_mesh else None
    at_once = "one client at a time" if chunk == 1 else f"{chunk} clients at once"
    where = f"{devices} devices, {at_once} on each" if wants_mesh else at_once
    axis = ClientAxis(
        chunk_size=chunk, refills=schedule.refills, steps=workload.equal_steps, mesh=mesh
    )
    return ClientAxisChoice(axis, f"{where} ({why})", chunk * workload.client_bytes)


def _places(
    config: CohortConfig, workload: Workload, platform: str, share: int
) -> tuple[Schedule, str]:
    if config.parallelism == "scan":
        return _ONE_BY_ONE, "as configured"
    if config.chunk_size:
        return _schedule(workload, share, [min(config.chunk_size, share)]), "as configured"
    if config.parallelism in ("auto", "mesh") and platform == "cpu":
        return _ONE_BY_ONE, f"auto on {platform}"
    limits = {
        "all that a device has": share,
        "they fill the device": math.ceil(STEP_BYTES / max(workload.client_bytes, 1)),
        "more would not fit": workload.largest_chunk,
    }
    why = min(limits, key=limits.__getitem__)
    limit, why = max(limits[why], 1), f"auto on {platform}: {why}"
    if workload.equal_steps:
        # In equal parts, so that none of them has empty places.
        limit = math.ceil(share / math.ceil(share / limit))
        return Schedule(limit, limit, 0), why
    fewer = {math.ceil(limit * 2 ** (-octaves / 4)) for octaves in range(13)}
    schedule = _schedule(workload, share, sorted(fewer))
    if schedule.places < limit:
        why = f"auto on {platform}: a round takes about {schedule.turns} steps of them"
    return schedule, why


def _schedule(workload: Workload, share: int, candidates: list[int]) -> Schedule:
    return choose_schedule(
        workload.steps,
        share,
        candidates,
        client_bytes=workload.client_bytes,
        arrival_bytes=workload.arrival_bytes,
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def count_turns(steps: np.ndarray, places: int, refills: int) -> int:
    """Plays a round through and counts the steps of all places.

    Args:
      steps: The clients' numbers of steps, int ``[n]``; those without steps play no part.
      places: Clients at once.
      refills: Places that may be refilled after a step.
    """
    waiting = np.sort(steps[steps > 0])[::-1]
    left = np.zeros(places, np.int64)
    following = min(places, len(waiting))
    left[:following] = waiting[:following]
    occupied = left > 0
    turns = 0
    while occupied.any():
        turns += 1
        left -= occupied & (left > 0)
        done = np.flatnonzero(occupied & (left == 0))[:refills]
        new = waiting[following : following + len(done)]
        left[done[: len(new)]] = new
        occupied[done[len(new) :]] = False
        following += len(new)
    return turns


def choose_schedule(
    steps: np.ndarray,
    clients: int,
    candidates: list[int],
    *,
    client_bytes: int,
    arrival_bytes: int,
) -> Schedule:
    """Chooses among numbers of places, and of places to refill after a step.

    Args:
      steps: Numbers of steps of clients of the population, int ``[n]``.
      clients: How many of them a device has in a round.
      candidates: Numbers of places.
      client_bytes: What a client's step moves, about.
      arrival_bytes: What a client's trained parameters take.
    """
    busy = steps[steps > 0]
    best, least = Schedule(min(candidates), min(candidates), 0), math.inf
    if not busy.size:
        return best
    mean = float(busy.mean())
    coarse = math.ceil(int(busy.max()) / _FINEST)
    ascending = np.sort(-(-steps // coarse))
    for places in sorted(candidates):
        # As a round is expected to draw them: evenly spread over the population's.
        played = min(clients, _LONGEST_PLAY * places)
        drawn = ascending[((np.arange(played) + 0.5) / played * len(steps)).astype(int)]
        for refills in sorted({min(math.ceil(room * places / mean), places) for room in _ROOM}):
            turns = coarse * count_turns(drawn, places, min(coarse * refills, places))
            turns = round(turns * clients / played)
            # A client that takes a place or leaves it is read and written once more.
            a_turn = LAUNCH_BYTES + places * client_bytes + 2 * refills * arrival_bytes
            if turns * a_turn < least:
                best, least = Schedule(places, refills, turns), turns * a_turn
    return best


def calls_of(finished: int, config: Config) -> list[tuple[int, int]]:
    """The calls that are left: numbers of rounds that are finished before and after each."""
    per_call = config.rounds_per_call
    boundaries = range((finished // per_call + 1) * per_call, config.rounds, per_call)
    ends = [*boundaries, config.rounds]
    return list(zip([finished, *ends], ends, strict=False)) if finished < config.rounds else []
