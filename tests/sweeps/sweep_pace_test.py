"""The time that is left to a sweep."""

import pytest

from fedqsn_jax.reporting.sweep_pace import SweepPace


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_programs_that_are_still_to_be_compiled_count():
    """Three programs of 20 rounds, by tens: 8 seconds to compile, then 2 seconds a call."""
    clock = Clock()
    pace = SweepPace(60, 0, 3, clock)
    assert pace.left is None

    def call(done, seconds):
        clock.now += seconds
        pace.add(done)

    for program in range(3):
        pace.begin()
        call(20 * program + 10, 8 + 2)
        if program == 0:
            # What took how long of it, nobody can tell yet.
            assert pace.left is None
        else:
            assert pace.left == pytest.approx(2 + (2 - program) * 12)
        call(20 * program + 20, 2)
        pace.add(20 * program + 20)
        assert pace.left == pytest.approx((2 - program) * 12)
    assert (pace.done, pace.elapsed) == (60, 36)


def test_time_passes_while_a_program_is_compiled():
    clock = Clock()
    pace = SweepPace(60, 20, 2, clock)
    pace.begin()
    for done, seconds in ((30, 10), (40, 2)):
        clock.now += seconds
        pace.add(done)
    assert pace.left == pytest.approx(12)
    pace.begin()
    assert pace.left == pytest.approx(12)
    clock.now += 7
    assert pace.left == pytest.approx(5)
    clock.now += 70
    assert pace.left == 0


def test_programs_of_one_call_each():
    """There is no other pace than theirs, and no need of one."""
    clock = Clock()
    pace = SweepPace(40, 0, 4, clock)
    pace.begin()
    clock.now += 9
    pace.add(10)
    assert pace.left == pytest.approx(27)
