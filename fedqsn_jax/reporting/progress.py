"""Progress: a live line in a terminal, plain lines of ASCII in a pipe; never silent for long.

`Ongoing` is the one mechanism. `Waiting`, `Steps` and `RoundProgress` say what is shown of what; a
sweep's is in its own folder.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedqsn_jax.reporting.summary import Metrics, main_views_of, number

Clock = Callable[[], float]
"""Gives seconds from any fixed point in time."""

_SECONDS_BETWEEN_SIGNS = 4.0
_SECONDS_BETWEEN_ROUNDS = 1.0
_REFRESHES_PER_SECOND = 2
_LATEST_CALLS = 20


class Ongoing:
    """Something that takes a while; it is shown for as long as its ``with`` block lasts.

    In a terminal `_render` is kept up to date below what is printed. In a pipe there are the lines
    that a subclass prints by `_say`; whenever there was none for some seconds, one says by `_still`
    that it goes on. What is over before that says nothing.
    """

    _vanishes = False
    """Whether nothing of it stays in a terminal."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        """Starts the clock.

        Args:
          console: Where to write.
          clock: Gives the time.
        """
        self._console, self._clock = console, clock
        self._began = clock()
        self._next_sign = self._began + _SECONDS_BETWEEN_SIGNS
        self._ended = threading.Event()
        self._speaking = threading.RLock()
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._render,
                console=console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                transient=self._vanishes,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        elif not self._console.quiet:
            threading.Thread(target=self._watch, name="signs of life", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()

    def tick(self) -> None:
        """Says in a pipe that it still goes on, if there was no line for some seconds."""
        with self._speaking:
            silent = self._live is None and not self._ended.is_set()
            if silent and self._clock() >= self._next_sign:
                self._say(self._still())

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            try:
                self.tick()
            except (OSError, ValueError):
                # Nobody reads, or the stream was closed: that is for the main thread to tell.
                return

    def _say(self, line: str) -> None:
        """Prints a line, but not above a live one."""
        if self._live is not None:
            return
        with self._speaking:
            self._console.print(Text(line), soft_wrap=True, highlight=False)
            self._next_sign = self._clock() + _SECONDS_BETWEEN_SIGNS

    def _render(self) -> RenderableType:
        raise NotImplementedError

    def _still(self) -> str:
        raise NotImplementedError


class Waiting(Ongoing):
    """Something whose end nobody knows: a spinner, and how long it has taken so far."""

    _vanishes = True

    def __init__(self, console: Console, what: str, clock: Clock = time.monotonic) -> None:
        """Starts the clock.

        Args:
          console: Where to write.
          what: What is going on.
          clock: Gives the time.
        """
        self._what = what
        self._spinner = Spinner("line" if console.options.ascii_only else "dots")
        super().__init__(console, clock)

    def now(self, what: str) -> None:
        """Tells what is going on from here on; the clock goes on."""
        self._what = what

    def _still(self) -> str:
        return f"{self._what}: {clock_text(self.elapsed)} so far"

    def _render(self) -> RenderableType:
        self._spinner.update(text=Text(f"{self._what}  {clock_text(self.elapsed)}"))
        return self._spinner


class Steps(Ongoing):
    """Something that is counted: a bar, or how far it has come."""

    _vanishes = True

    def __init__(
        self, console: Console, what: str, total: int, clock: Clock = time.monotonic
    ) -> None:
        """Starts the clock.

        Args:
          console: Where to write.
          what: What is going on.
          total: The count at its end.
          clock: Gives the time.
        """
        self._what, self._total, self._done = what, total, 0
        super().__init__(console, clock)
        self._say(f"{what}: {total} in all")

    def add(self, count: int) -> None:
        """Tells how many more are done."""
        self._done += count

    def _still(self) -> str:
        return f"{self._what}: {self._done} of {self._total}, {clock_text(self.elapsed)} so far"

    def _render(self) -> RenderableType:
        count = f"{self._what} {self._done}/{self._total}"
        return bar_row(count, self._done, self._total, f"{clock_text(self.elapsed)} elapsed")


class _Measured(NamedTuple):
    """What was measured so far, and when.

    Attributes:
      time: When the latest call ended, or the latest program began.
      done: Finished rounds.
      begun: Programs that have begun.
      first: Whether the call that is running is the first of its program.
      first_calls: Rounds and seconds of each first call, these from its program's beginning on.
      calls: Rounds and seconds of the latest other calls.
    """

    time: float
    done: int
    begun: int = 0
    first: bool = False
    first_calls: tuple[tuple[int, float], ...] = ()
    calls: tuple[tuple[int, float], ...] = ()


class Pace:
    """How fast rounds are, and the time that is left, from calls of compiled programs.

    A program's first call includes its compilation, and whatever else comes before it. So first
    calls are counted apart from the others: those to come with the mean of those done, all other
    rounds at the pace of the latest calls that were no first ones. That pace is unknown until there
    was one; until then so is the time, unless first calls are all that there is.
    """

    def __init__(self, total: int, start: int, programs: int, clock: Clock) -> None:
        """Starts the clock.

        Args:
          total: Rounds in all.
          start: How many are done already.
          programs: Compiled programs that the others take.
          clock: Gives the time.
        """
        self.total = total
        self._programs, self._clock = programs, clock
        # Replaced as a whole and never changed: displays read it from their own threads.
        self._measured = _Measured(clock(), start)

    @property
    def done(self) -> int:
        """Finished rounds."""
        return self._measured.done

    @property
    def compiling(self) -> bool:
        """Whether the call that is running includes a compilation."""
        return self._measured.first

    def begin(self) -> None:
        """Tells that the next program begins; it is going to be compiled."""
        was = self._measured
        self._measured = was._replace(time=self._clock(), begun=was.begun + 1, first=True)

    def add(self, done: int) -> None:
        """Tells that a call has ended, and how many rounds are done now."""
        now, was = self._clock(), self._measured
        call = (done - was.done, now - was.time)
        if call[0] <= 0:
            # The end of a point, after that of its last call.
            return
        if was.first:
            after = was._replace(first_calls=(*was.first_calls, call))
        else:
            after = was._replace(calls=(*was.calls, call)[-_LATEST_CALLS:])
        self._measured = after._replace(time=now, done=done, first=False)

    @property
    def rate(self) -> float | None:
        """Rounds a second, or None."""
        rounds, seconds = _sums(self._measured.calls)
        return rounds / seconds if seconds else None

    @property
    def left(self) -> float | None:
        """Seconds until the last round, or None."""
        now = self._measured
        if now.done >= self.total:
            return 0.0
        if not now.first_calls:
            return None
        compilations = self._programs - now.begun + now.first
        first_rounds, first_seconds = _sums(now.first_calls)
        firsts = len(now.first_calls)
        others = max(0.0, self.total - now.done - compilations * first_rounds / firsts)
        if others and not now.calls:
            return None
        left = compilations * first_seconds / firsts
        rounds, seconds = _sums(now.calls)
        left += others * seconds / rounds if others else 0.0
        return max(0.0, left - (self._clock() - now.time))


def _sums(calls: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """The rounds of some calls, and their seconds."""
    return sum(rounds for rounds, _ in calls), sum(seconds for _, seconds in calls)


class RoundProgress(Ongoing):
    """The rounds of a run: a bar and the latest scores, or a line for an evaluated round.

    Of the lines there is at most one for a second of the run's time, and always the first and last.
    """

    def __init__(
        self, console: Console, total: int, start: int, score: str, clock: Clock = time.monotonic
    ) -> None:
        """Starts the clock.

        Args:
          console: Where to write.
          total: Number of rounds in all.
          start: Number of rounds that are done already.
          score: The metric that is shown for each view (of the attackers, the largest).
          clock: Gives the time.
        """
        self._score = score
        self._pace = Pace(total, start, 1, clock)
        self._pace.begin()
        self._views: list[str] | None = None
        self._latest: Metrics = {}
        self._pending = False
        self._said_seconds = -math.inf
        super().__init__(console, clock)

    def __exit__(self, *exception: object) -> None:
        # What was held back is the last word of an interrupted run, too.
        if self._pending:
            self._say_latest()
        super().__exit__(*exception)

    def update(self, round: int, entries: Sequence[Metrics] = ()) -> None:
        """Tells that a call has ended, or, before the first one, what was evaluated before it.

        Args:
          round: Number of finished rounds.
          entries: The rounds that were evaluated in it.
        """
        self._pace.add(round)
        for entry in entries:
            self._latest, self._pending = entry, True
            seconds = float(entry.get("seconds", math.inf))
            last = entry["round"] >= self._pace.total
            if last or seconds - self._said_seconds >= _SECONDS_BETWEEN_ROUNDS:
                self._say_latest()
                self._said_seconds = seconds

    def _say_latest(self) -> None:
        entry, self._pending = self._latest, False
        if self._views is None:
            self._views = main_views_of(entry, self._score)
            self._say(f"{self._score} of each view:")
            heads = {view: view for view in self._views}
            self._say(self._line("round", heads, "rounds/s", "left"))
        values = {view: number(entry.get(f"{view}/{self._score}")) for view in self._views}
        scores = {view: f"{value:.4f}" for view, value in values.items() if value is not None}
        self._say(self._line(self._count(entry["round"]), scores, *self._pace_texts()))

    def _count(self, round: int) -> str:
        return f"{round}/{self._pace.total}"

    def _line(self, count: str, scores: dict[str, str], rate: str, left: str) -> str:
        cells = [self._first_cell(count)]
        cells += [f"{scores.get(view, '-'):>{max(len(view), 7)}}" for view in self._views or ()]
        return "  ".join([*cells, f"{rate:>8}", f"{left:>7}"])

    def _first_cell(self, text: str) -> str:
        return f"{text:>{max(2 * len(str(self._pace.total)) + 1, 5)}}"

    def _pace_texts(self) -> tuple[str, str]:
        rate, left = self._pace.rate, self._pace.left
        return (
            "-" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
            "-" if left is None else clock_text(left),
        )

    def _still(self) -> str:
        words = [f"{clock_text(self.elapsed)} so far"]
        if self._pace.compiling:
            words.append("the rounds are compiled in the first call")
        elif self._pace.left is not None:
            words.append(f"{clock_text(self._pace.left)} left")
        return f"{self._first_cell(self._count(self._pace.done))}  {', '.join(words)}"

    def _render(self) -> RenderableType:
        pace, entry = self._pace, self._latest
        rate, left = self._pace_texts()
        facts = [f"{rate} rounds/s"] if pace.rate else []
        running = pace.done < pace.total and left != "-"
        facts.append(f"{left} left" if running else f"{clock_text(self.elapsed)} elapsed")
        if pace.compiling and pace.done < pace.total:
            facts.insert(0, "compiling")
        count = f"round {pace.done:>{len(str(pace.total))}}/{pace.total}"
        bar = bar_row(count, pace.done, pace.total, "  ".join(facts))
        if not entry:
            return bar
        scores = Text(self._score, "dim")
        known = [name for name, value in entry.items() if number(value) is not None]
        for view in main_views_of(known, self._score):
            scores.append(f"  {view} ", "default not dim")
            scores.append(f"{float(entry[f'{view}/{self._score}']):.4f}", "bold not dim")
        return Group(bar, scores)


def bar_row(count: str, done: int, total: int, facts: str) -> Table:
    """Returns a line of a live display: what is counted, a bar, and facts about it."""
    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    bar: Any = ProgressBar(total=max(total, 1), completed=done if total else 1)
    row.add_row(Text(count, "bold"), bar, Text(facts, "cyan"))
    return row


def clock_text(seconds: float) -> str:
    """Returns a duration as ``h:mm:ss``, rounded to whole seconds."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
