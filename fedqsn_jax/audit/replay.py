"""A run again, from its seed, to write down what colluding clients were sent.

A simulation is deterministic, so the same rounds give the same proxies. Before each round every
member of a coalition that takes part is sent its proxy, as bytes (`protocol.wire`), by the pure
functions that the round itself uses. At the end the replayed model is compared with the run's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.audit.case import Case
from fedqsn_jax.core.types import Array, Params
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import Proxy, whole_proxy
from fedqsn_jax.protocol.wire import encode_proxy
from fedqsn_jax.rounds.calls import draw_cohorts
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.simulation.running import run_rounds

Keep = Callable[[int, int, bytes], None]
"""``(round, client, payload)``; rounds count from 0."""


class Change(NamedTuple):
    """What a round did to the model that is sent, for the scoring of `subtraction`.

    Attributes:
      round: The round, from 0 on.
      params: The change of the tensors that travel, on the host.
    """

    round: int
    params: Params


class Replayed(NamedTuple):
    """What a replay found.

    Attributes:
      difference: The largest difference of a parameter between the replay's end and the run's.
      changes: What the rounds did of which they were asked.
    """

    difference: float
    changes: tuple[Change, ...]


def make_client_proxy(case: Case) -> Callable[[ServerState, Array], Proxy]:
    """Makes ``(state, client id) -> Proxy``: what a client is sent in the state's next round."""
    method = case.simulation.method

    @jax.jit
    def client_proxy(state: ServerState, client: Array) -> Proxy:
        sent = case.sent(method.broadcast.sent(state.broadcast, state.params))
        prepared = method.transform.prepare(state.transform_state, whole_proxy(sent, method.sites))
        return method.proxy_of(
            client,
            prepared,
            secret_key=state.secret_key,
            round_index=state.round,
            transform_state=state.transform_state,
        )

    return client_proxy


def payload_layout(case: Case) -> Layout:
    """The static structure of the run's payloads."""
    shapes = jax.eval_shape(make_client_proxy(case), case.start, jnp.int32(0))
    return Layout.of(shapes)


def payloads_by_round(case: Case, members: Sequence[int]) -> dict[int, list[int]]:
    """Which members are sent a payload, by round from 0 on; rounds without any are left out.

    That is who takes part; but where a client's payload never changes, only the first time. What a
    client is sent again because it lost its copy teaches nothing and is left out.
    """
    by_round, broadcast = members_by_round(case, members), case.simulation.method.broadcast
    if not broadcast.is_one_way or broadcast.renewed:
        return by_round
    had: set[int] = set()
    first = {}
    for index, own in by_round.items():
        new = [member for member in own if member not in had]
        had |= set(new)
        if new:
            first[index] = new
    return first


def members_by_round(case: Case, members: Sequence[int]) -> dict[int, list[int]]:
    """Which members take part, by round from 0 on; rounds without any are left out."""
    cohorts = draw_cohorts(case.simulation.federation, case.final, case.config.rounds)
    wanted, found = set(map(int, members)), {}
    for index, cohort in enumerate(cohorts):
        own = [int(client) for client in cohort if int(client) in wanted]
        if own:
            found[index] = own
    return found


def states(case: Case) -> Iterator[tuple[int, ServerState]]:
    """Runs the rounds again: ``(finished rounds, state)`` from the start to the end.

    A state is gone when the next one is asked for.
    """
    # The rounds are given a copy: their state is donated.
    start = jax.tree.map(jnp.copy, case.start)
    yield 0, start
    for finished, state, _ in run_rounds(case.simulation, start, case.data, case.held_out):
        yield finished, state


def replay(
    case: Case,
    members: Sequence[int],
    keep: Keep,
    done: Callable[[int], None],
    changes: Sequence[int] = (),
) -> Replayed:
    """Runs the rounds again.

    Args:
      case: The run.
      members: The clients whose proxies are kept.
      keep: Is called with every proxy that one of them is sent.
      done: Is called with the number of finished rounds.
      changes: The rounds, from 0 on, whose effect on the model is wanted.
    """
    client_proxy = make_client_proxy(case)
    by_round = payloads_by_round(case, members)
    wanted: set[int] = set(changes)
    found: list[Change] = []

    def send(state: ServerState) -> None:
        for client in by_round.get(int(state.round), []):
            payload = encode_proxy(jax.device_get(client_proxy(state, jnp.int32(client))))
            keep(int(state.round), client, payload)

    def of_sent(state: ServerState) -> Params:
        return jax.tree.map(np.array, jax.device_get(case.sent(state.params)))

    before = None
    for after, state in states(case):
        if after - 1 in wanted:
            difference = jax.tree.map(np.subtract, of_sent(state), before)
            found.append(Change(after - 1, difference))
        before = of_sent(state) if after in wanted else None
        if after < case.config.rounds:
            send(state)
        if after:
            done(after)
    gaps = jax.tree.map(
        lambda ours, theirs: jnp.abs(ours.astype(jnp.float32) - theirs).max(),
        state.params,
        case.final.params,
    )
    return Replayed(max(map(float, jax.tree.leaves(gaps))), tuple(found))
