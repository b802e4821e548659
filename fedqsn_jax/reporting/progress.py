"""Progress of the rounds: a live bar in a terminal, plain lines of ASCII in a pipe."""

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedqsn_jax.reporting.summary import Metrics, main_views_of

Clock = Callable[[], float]
"""Gives seconds from any fixed point in time."""

_BURST_SECONDS = 0.05
_BURSTS = 20
_SECONDS_BETWEEN_LINES = 1.0
_REFRESHES_PER_SECOND = 4


class Progress(Protocol):
    """Shows how far a run has come; a context manager."""

    def update(self, round: int, metrics: Metrics | None = None) -> None:
        """Tells that a round is done.

        Args:
          round: Number of finished rounds.
          metrics: The round's metrics if it was evaluated.
        """

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *exception: Any) -> None: ...


def make_progress(
    console: Console, total: int, start: int, score: str, clock: Clock = time.monotonic
) -> Progress:
    """Makes the display that suits the console.

    Args:
      console: Where to write.
      total: Number of rounds in all.
      start: Number of rounds that are done already.
      score: The metric that is shown for each view (of the attackers, the largest).
      clock: Gives the time.
    """
    live = console.is_terminal and not console.is_dumb_terminal
    kind = _LiveProgress if live else _PlainProgress
    return kind(console, score, Pace(total, start, clock), clock)


class Pace:
    """Estimates rounds a second, and the time that is left.

    Rounds are reported in bursts, one for each compiled call, and the first burst includes the
    compilation. So the pace is measured between ends of bursts, from the first one's end, over
    the latest bursts; it is unknown until two have ended.
    """

    def __init__(self, total: int, start: int, clock: Clock) -> None:
        """Starts the clock.

        Args:
          total: Number of rounds in all.
          start: Number of rounds that are done already.
          clock: Gives the time.
        """
        self.total = total
        self.done = start
        self._start = start
        self._clock = clock
        self._begun = clock()
        # Replaced as a whole and never changed: the live display reads it from its own thread.
        self._bursts: tuple[tuple[float, int], ...] = ()

    def add(self, round: int) -> None:
        """Tells that so many rounds are done."""
        self.done = round
        if round <= self._start:
            return
        now = self._clock()
        if self._bursts and now - self._bursts[-1][0] < _BURST_SECONDS:
            self._bursts = (*self._bursts[:-1], (self._bursts[-1][0], round))
        else:
            self._bursts = (*self._bursts, (now, round))[-_BURSTS:]

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begun

    @property
    def rate(self) -> float | None:
        """Rounds a second, or None."""
        bursts = self._ended()
        if len(bursts) < 2:
            return None
        (first_time, first_round), (last_time, last_round) = bursts[0], bursts[-1]
        return (last_round - first_round) / (last_time - first_time)

    @property
    def left(self) -> float | None:
        """Seconds until the last round, or None."""
        rate = self.rate
        if self.done >= self.total:
            return 0.0
        if not rate:
            return None
        last_time, last_round = self._ended()[-1]
        return max(0.0, (self.total - last_round) / rate - (self._clock() - last_time))

    def _ended(self) -> tuple[tuple[float, int], ...]:
        bursts = self._bursts
        finished = self.done >= self.total
        if bursts and not finished and self._clock() - bursts[-1][0] < _BURST_SECONDS:
            return bursts[:-1]
        return bursts


class _PlainProgress:
    """One line for an evaluated round, at most one a second, and always the first and the last."""

    def __init__(self, console: Console, score: str, pace: Pace, clock: Clock) -> None:
        self._console = console
        self._score = score
        self._pace = pace
        self._clock = clock
        self._views: list[str] = []
        self._printed_at = -math.inf
        self._pending: Metrics | None = None
        self._pending_round = 0

    def __enter__(self) -> "_PlainProgress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What was held back is the last word of an interrupted run, too.
        self._print_pending()

    def update(self, round: int, metrics: Metrics | None = None) -> None:
        self._pace.add(round)
        if metrics:
            self._pending, self._pending_round = metrics, round
            passed = self._clock() - self._printed_at
            if passed >= _SECONDS_BETWEEN_LINES or round >= self._pace.total:
                self._print_pending()

    def _print_pending(self) -> None:
        if self._pending is None:
            return
        if self._printed_at == -math.inf:
            self._views = main_views_of(self._pending, self._score)
            self._print(f"{self._score} of each view:")
            self._print(
                self._line("round", {view: view for view in self._views}, "rounds/s", "left")
            )
        values = {view: self._pending.get(f"{view}/{self._score}") for view in self._views}
        scores = {view: f"{float(v):.4f}" for view, v in values.items() if v is not None}
        count = f"{self._pending_round}/{self._pace.total}"
        self._print(self._line(count, scores, *_pace_text(self._pace)))
        self._pending = None
        self._printed_at = self._clock()

    def _line(self, count: str, scores: dict[str, str], rate: str, left: str) -> str:
        digits = 2 * len(str(self._pace.total)) + 1
        cells = [f"{count:>{max(digits, 5)}}"]
        cells += [f"{scores.get(view, '-'):>{max(len(view), 7)}}" for view in self._views]
        return "  ".join([*cells, f"{rate:>8}", f"{left:>7}"])

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True, highlight=False)


class _LiveProgress:
    """A bar and the latest scores, kept up to date at the bottom of the terminal."""

    def __init__(self, console: Console, score: str, pace: Pace, clock: Clock) -> None:
        self._score = score
        self._pace = pace
        self._metrics: Metrics = {}
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=_REFRESHES_PER_SECOND,
        )

    def __enter__(self) -> "_LiveProgress":
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, round: int, metrics: Metrics | None = None) -> None:
        self._pace.add(round)
        if metrics:
            self._metrics = metrics

    def _render(self) -> RenderableType:
        pace, metrics = self._pace, self._metrics
        rate, left = _pace_text(pace)
        running = pace.done < pace.total
        bar = Table.grid(padding=(0, 2, 0, 0), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        facts = [f"{rate} rounds/s"] if pace.rate else []
        facts += (
            [f"{left} left"] if running and pace.rate else [f"{clock_text(pace.elapsed)} elapsed"]
        )
        bar.add_row(
            Text(f"round {pace.done:>{len(str(pace.total))}}/{pace.total}", "bold"),
            ProgressBar(total=max(pace.total, 1), completed=pace.done if pace.total else 1),
            Text("  ".join(facts), "cyan"),
        )
        scores = Text(self._score, "dim")
        known = [name for name, value in metrics.items() if value is not None]
        for view in main_views_of(known, self._score):
            scores.append(f"  {view} ", "default not dim")
            scores.append(f"{float(metrics[f'{view}/{self._score}']):.4f}", "bold not dim")
        return Group(bar, scores) if metrics else bar


def _pace_text(pace: Pace) -> tuple[str, str]:
    rate, left = pace.rate, pace.left
    return (
        "-" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
        "-" if left is None else clock_text(left),
    )


def clock_text(seconds: float) -> str:
    """Returns a duration as ``h:mm:ss``, rounded to whole seconds."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
