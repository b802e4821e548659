"""How long clients side by side keep a device busy, by how many of them stand there at once.

A chunk has places in which clients of different lengths stand; after every step of all places some
that became free are refilled (see `cohort`). Few places take many steps for a round, and each step
costs its launches; many places stand empty while the longest client trains on. Room for few to come
and go lets places wait, room for many costs time in every step, needed or not. None of it depends
on what clients compute, so a round is played through with numbers of steps alone, for several
candidates, and the cheapest is taken.

The costs were fitted on an H200 (JAX 0.11.2, 2026-11-25) to rounds of 100, 1,000 and 10,000 clients
with 50 to 1,064 places. Among rounds of one size they agree with what was measured to 5%, between
sizes to 11%; but for one choice, a sixth slower, for which the compiler had made a bad kernel.
"""

import math
from typing import NamedTuple

import numpy as np

LAUNCH_BYTES = 3 * 2**26
"""What a device moves in the time that the launches of a step's kernels take."""

_ROOM = (1.0, 1.25, 1.5, 2.0, 3.0)
"""Candidates for the room to come and go, by the number of places that become free on average."""

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
    """Chooses among numbers of places, and the room to come and go.

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
            # A client that comes or goes is read and written once more.
            a_turn = LAUNCH_BYTES + places * client_bytes + 2 * refills * arrival_bytes
            if turns * a_turn < least:
                best, least = Schedule(places, refills, turns), turns * a_turn
    return best
