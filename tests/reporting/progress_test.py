"""Progress: the time that is left, lines in a pipe, live lines, and signs of life."""

import io
import re

import pytest
from reporting_cases import entry
from rich.console import Console

from fedqsn_jax.reporting.display import Display
from fedqsn_jax.reporting.progress import Pace, RoundProgress, Steps, Waiting, clock_text


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_programs_that_are_still_to_be_compiled_count():
    """Three programs of 20 rounds, by tens: 8 seconds to compile, then 2 seconds a call."""
    clock = Clock()
    pace = Pace(60, 0, 3, clock)
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
    assert pace.done == 60
    # Three calls of ten rounds that took two seconds each.
    assert pace.rate == pytest.approx(5)


def test_time_passes_while_a_program_is_compiled():
    clock = Clock()
    pace = Pace(60, 20, 2, clock)
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
    pace = Pace(40, 0, 4, clock)
    pace.begin()
    clock.now += 9
    pace.add(10)
    assert pace.left == pytest.approx(27)


def pipe(width=80):
    return Console(file=io.StringIO(), width=width)


def terminal(width=120):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")


def without_styles(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def scores(number, seconds=None):
    times = {} if seconds is None else {"seconds": seconds}
    return entry(number, (number / 1000, 0.2, 0.3, 0.4, 0.5), **times)


def test_rounds_in_a_pipe_are_throttled_but_the_first_and_last_are_shown():
    console, clock = pipe(), Clock()
    with RoundProgress(console, 100, 0, "accuracy", clock) as progress:
        progress.update(0, [scores(0, 0.0)])
        for call in range(10):
            # Calls of ten rounds, one every 0.4 seconds after the first, which compiles.
            clock.now += 30.4 if call == 0 else 0.4
            began = 0.0 if call == 0 else 30.0 + 0.4 * call
            took = 30.4 if call == 0 else 0.4
            entries = [scores(10 * call + n, began + took * n / 10) for n in range(1, 11)]
            progress.update(10 * call + 10, entries)
    text = console.file.getvalue()
    assert text.isascii()
    caption, header, *lines = text.splitlines()
    assert "accuracy" in caption
    assert header.split() == [
        "round", "global", "server", "proxy", "attacker_10", "rounds/s", "left"
    ]  # fmt: skip
    rows = [line.split() for line in lines]
    # The rounds of the first call are far apart: each has a line.
    assert [row[0] for row in rows] == [f"{round}/100" for round in (*range(11), 35, 60, 85, 100)]
    assert rows[0][1:] == ["0.0000", "0.2000", "0.3000", "0.5000", "-", "-"]
    # 25 rounds a second without the compilation; 60 are left after the call of round 35.
    assert rows[11][-2:] == ["25", "0:00:02"]
    assert rows[-1][-2:] == ["25", "0:00:00"]


def test_interrupted_progress_tells_the_last_round_and_restores_the_terminal():
    def interrupted(console):
        with RoundProgress(console, 100, 40, "accuracy", Clock()) as progress:
            for number in (40, 60, 70):
                progress.update(number, [scores(number, number / 100)])
            raise KeyboardInterrupt

    console = pipe()
    with pytest.raises(KeyboardInterrupt):
        interrupted(console)
    shown = [line.split()[0] for line in console.file.getvalue().splitlines()[2:]]
    assert shown == ["40/100", "70/100"]
    console = terminal()
    with pytest.raises(KeyboardInterrupt):
        interrupted(console)
    text = console.file.getvalue()
    assert "70/100" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("width", [80, 120])
def test_rounds_in_a_terminal_show_pace_and_scores(width):
    console, clock = terminal(width), Clock()
    with RoundProgress(console, 60, 0, "accuracy", clock) as progress:
        for number in range(10, 60, 10):
            clock.now += 5.1
            progress.update(number, [scores(number)])
        clock.now += 0.1
        Display(console).message("a message meanwhile")
    frames = without_styles(console.file.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, frames)) <= width
    assert "a message meanwhile" in frames
    bar, last = frames[-2:]
    assert bar.startswith("round 50/60")
    assert bar.rstrip().endswith("1.96 rounds/s  0:00:05 left")
    assert last.rstrip() == (
        "accuracy  global 0.0500  server 0.2000  proxy 0.3000  attacker_10 0.5000"
    )


def test_nothing_is_silent_for_more_than_five_seconds():
    """A timer ticks twice a second; what is quick says nothing."""
    console, clock = pipe(), Clock()
    began = clock.now
    spoken = [began]
    with Waiting(console, "loading", clock) as waiting:
        for _ in range(60):
            before = console.file.getvalue()
            clock.now += 0.5
            waiting.tick()
            if console.file.getvalue() != before:
                spoken.append(clock.now)
    assert console.file.getvalue().splitlines()[:2] == [
        "loading: 0:00:04 so far",
        "loading: 0:00:08 so far",
    ]
    assert max(b - a for a, b in zip(spoken, [*spoken[1:], clock.now], strict=True)) < 5
    clock.now += 100
    before = console.file.getvalue()
    waiting.tick()
    assert console.file.getvalue() == before  # it is over

    quick = pipe()
    with Waiting(quick, "loading", Clock()) as waiting:
        waiting.tick()
    assert quick.file.getvalue() == ""


def test_rounds_that_take_long_give_signs_of_life():
    console, clock = pipe(), Clock()
    with RoundProgress(console, 20, 0, "accuracy", clock) as progress:
        progress.update(0, [scores(0, 0.0)])
        clock.now += 4.5
        progress.tick()
        for finished in (5, 10):
            clock.now += 3.0
            progress.update(finished)
        clock.now += 2.0
        progress.tick()
    assert [line.split(maxsplit=1) for line in console.file.getvalue().splitlines()[3:]] == [
        ["0/20", "0:00:04 so far, the rounds are compiled in the first call"],
        ["10/20", "0:00:12 so far, 0:00:04 left"],
    ]


def test_what_is_counted():
    console, clock = pipe(), Clock()
    with Steps(console, "writing texts", 8, clock) as steps:
        steps.add(3)
        clock.now += 5
        steps.tick()
    assert console.file.getvalue() == (
        "writing texts: 8 in all\nwriting texts: 3 of 8, 0:00:05 so far\n"
    )
    console = terminal()
    with Steps(console, "writing texts", 8, clock) as steps:
        steps.add(3)
    assert "writing texts 3/8" in without_styles(console.file.getvalue())


def test_durations():
    assert [clock_text(s) for s in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
