"""How many clients stand side by side: rounds played through, against hand-made ones and others."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_jax.rounds.client_axis import ClientAxis, ClientWork, sum_over_clients
from fedqsn_jax.simulation.scheduling import LAUNCH_BYTES, choose_schedule, count_turns


@pytest.mark.parametrize(
    ("steps", "places", "refills", "turns"),
    [
        ([], 3, 3, 0),
        ([0, 0], 3, 3, 0),
        ([4], 3, 3, 4),
        ([4, 0, 1], 1, 1, 5),
        ([5, 5, 5, 5], 2, 2, 10),
        # 3 and 2; after two steps the 1 follows the 2: all are done when the 3 is.
        ([1, 2, 3], 2, 2, 3),
        # Both are done after two steps, but one place is refilled at a time: its client trains in
        # the third and fourth, the other's in the fourth and fifth.
        ([2, 2, 2, 2], 2, 1, 5),
    ],
)
def test_rounds_counted_by_hand(steps, places, refills, turns):
    assert count_turns(np.array(steps, int), places, refills) == turns


@given(
    st.lists(st.integers(0, 9), max_size=40),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_no_round_is_shorter_than_its_longest_client_or_its_work(steps, places, refills):
    steps = np.array(steps, int)
    refills = min(refills, places)
    turns = count_turns(steps, places, refills)
    assert turns >= max(steps.max(initial=0), math.ceil(steps.sum() / places))
    assert turns <= steps.sum()
    if places == 1:
        assert turns == steps.sum()
    if refills >= len(steps):
        assert turns == steps.max(initial=0)


@pytest.mark.parametrize(("places", "refills"), [(3, 1), (4, 2), (5, 5)])
def test_a_cohort_takes_the_turns_that_are_counted(places, refills):
    steps = np.random.default_rng(0).integers(0, 7, 17)
    calls = []

    def step(context, client, index, carry):
        jax.debug.callback(lambda _: calls.append(0), client)
        return carry + 1

    work = ClientWork(
        lambda context, client: jnp.int32(0), step, lambda context, client, carry: (carry, ())
    )
    total, _ = jax.jit(
        lambda counts: sum_over_clients(work, (), counts, ClientAxis(places, refills))
    )(jnp.asarray(steps, jnp.int32))
    jax.effects_barrier()
    assert total == steps.sum()
    # One call a place and turn.
    assert len(calls) == places * count_turns(steps, places, refills)


def test_the_cheapest_of_the_candidates_is_taken():
    steps = np.array([20] + [4] * 99)
    settings = {"client_bytes": 2**21, "arrival_bytes": 2**20}
    chosen = choose_schedule(steps, 100, [7, 10, 20, 40, 80], **settings)

    def cost(places, refills):
        a_turn = LAUNCH_BYTES + places * 2**21 + refills * 2**21
        return count_turns(steps, places, refills) * a_turn

    least = min(
        cost(places, refills)
        for places in (7, 10, 20, 40, 80)
        for refills in {math.ceil(places * room * 100 / 416) for room in (1, 1.25, 1.5, 2, 3)}
    )
    assert chosen.turns == count_turns(steps, chosen.places, chosen.refills)
    assert cost(chosen.places, chosen.refills) == least


def test_launches_ask_for_more_places_and_waiting_for_fewer():
    steps = np.array([20] + [4] * 99)
    by_launches = choose_schedule(steps, 100, [5, 40, 100], client_bytes=1, arrival_bytes=0)
    by_bytes = choose_schedule(steps, 100, [5, 40, 100], client_bytes=2**40, arrival_bytes=0)
    # 20 steps are all that the longest needs, and 40 places do the rest meanwhile.
    assert (by_launches.places, by_launches.turns) == (40, 20)
    assert by_bytes.places == 5


def test_a_sample_of_the_population_stands_for_a_larger_round():
    steps = np.random.default_rng(0).integers(1, 9, 200)
    settings = {"client_bytes": 2**21, "arrival_bytes": 2**20}
    many = choose_schedule(steps, 20000, [50], **settings)
    ideal = 20000 * steps.mean() / 50
    assert ideal <= many.turns <= 1.1 * ideal
    # Ten times the steps take ten times as long, though several are played as one.
    longer = choose_schedule(10 * steps, 20000, [50], **settings)
    assert 10 * ideal <= longer.turns <= 1.1 * 10 * ideal
    nobody = choose_schedule(np.zeros(5, int), 5, [2, 4], **settings)
    assert (nobody.places, nobody.turns) == (2, 0)
