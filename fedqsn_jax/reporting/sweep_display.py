"""What a user sees of a sweep: progress over its points, and the table of its settings."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedqsn_jax.reporting.display import Display
from fedqsn_jax.reporting.estimates import (
    Estimate,
    Setting,
    pareto_front,
    rival_view,
    score_of,
    short_names,
)
from fedqsn_jax.reporting.progress import Clock, clock_text
from fedqsn_jax.reporting.summary import main_views_of
from fedqsn_jax.reporting.sweep_pace import SweepPace

Record = Mapping[str, Any]
"""A finished point: ``settings``, ``seed`` and ``metrics``."""

_SECONDS_BETWEEN_LINES = 1.0
_REFRESHES_PER_SECOND = 4


class SweepProgress(Protocol):
    """Shows how far a sweep has come; a context manager."""

    def update(self, rounds: int, points: int | None = None, record: Record | None = None) -> None:
        """Tells what is done.

        Args:
          rounds: Finished rounds of all points.
          points: Finished points, where that has changed.
          record: The point that was finished.
        """

    def begin_program(self) -> None:
        """Tells that the next program begins, which is going to be compiled."""

    def __enter__(self) -> "SweepProgress": ...

    def __exit__(self, *exception: Any) -> None: ...


class SweepDisplay(Display):
    """Writes everything that a sweep tells its user while it goes on."""

    def start(
        self, points: int, missing: int, programs: int, repeated: int, directory: str
    ) -> None:
        """Says what is going to be done.

        Args:
          points: Points of the sweep.
          missing: How many are not finished yet.
          programs: Compiled programs that the missing ones take.
          repeated: Combinations that were left out because they are the same as others.
          directory: The sweep's.
        """
        self._say_repeated(repeated)
        done = f", {points - missing} of them finished before" if missing < points else ""
        self.message(f"{points} points{done}; {programs} programs to compile; in {directory}")

    def groups(self, groups: Sequence[tuple[int, str]], repeated: int = 0) -> None:
        """Shows how many points each compiled program has, and how their clients are run."""
        self._say_repeated(repeated)
        for count, reason in groups:
            self.message(f"{count:>5} points in one compiled program, {reason}")
        self.message(f"{sum(count for count, _ in groups):>5} points in all")

    def sweep_progress(
        self, rounds: int, done: int, points: int, finished: int, programs: int
    ) -> SweepProgress:
        """Shows progress inside a ``with`` block.

        Args:
          rounds: Rounds of all points.
          done: How many are done already.
          points: Points of the sweep.
          finished: How many are finished already.
          programs: Compiled programs that the others take.
        """
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        kind = _LiveProgress if live else _PlainProgress
        pace = SweepPace(rounds, done, programs, time.monotonic)
        return kind(self._console, pace, points, finished)

    def table(self, settings: Sequence[Setting]) -> None:
        """Prints a row a setting: the views' scores and what a client receives.

        Args:
          settings: What was measured; not empty.
        """
        score, attacker = score_of(settings), rival_view(settings, "attacker")
        seeds = max(setting.seeds for setting in settings)
        start = settings[0].metrics[f"start/{score}"].mean
        of_seeds = f"mean of {seeds} seeds with its 95% interval" if seeds > 1 else "one seed"
        self.message(f"\n{score} at the end, {of_seeds}")
        self.message(f"(global before the first round {start:.3f})")
        table = self._settings_table(settings, score, attacker, intervals=True)
        if self._natural_width(table) > self._console.width:
            table = self._settings_table(settings, score, attacker, intervals=False)
        if self._natural_width(table) > self._console.width:
            table = self._settings_table(settings, score, attacker, intervals=False, apart=False)
        self._print_table(table)
        self.message(f"* no other setting is better for global and worse for {attacker}")

    def _settings_table(
        self,
        settings: Sequence[Setting],
        score: str,
        attacker: str,
        intervals: bool,
        apart: bool = True,
    ) -> Table:
        """A row a setting; ``apart``: each field in a column of its own, or all fields in one."""
        views = ("global", "proxy", attacker)
        table = self._table()
        if not apart:
            table.add_column("setting", overflow="fold")
        names = short_names(settings[0].settings)
        for field in settings[0].settings if apart else ():
            values = [each.settings[field] for each in settings]
            numbers = all(isinstance(value, int | float | None) for value in values)
            table.add_column(names[field], justify="right" if numbers else "left", no_wrap=True)
        for view in (*(view.replace("_", " ") for view in views), "KB down"):
            table.add_column(view, justify="right", no_wrap=True)
        front = pareto_front([_pair(setting, attacker, score) for setting in settings])
        for index, setting in enumerate(settings):
            if apart:
                own = setting.settings.values()
                cells = ["-" if value is None else str(value) for value in own]
            else:
                cells = [_described(setting.settings)]
            estimates = [setting.metrics.get(f"{view}/{score}") for view in views]
            cells += [self._estimate(each, intervals) for each in estimates]
            cells.append(f"{setting.metrics['bytes/down_per_client'].mean / 1000:,.1f}")
            cells[0] = f"{cells[0]} *" if index in front else cells[0]
            table.add_row(*map(Text, cells))
        return table

    def written(self, paths: Sequence[Path]) -> None:
        """Says where the results are."""
        self.message("written: " + ", ".join(map(str, paths)))

    def _say_repeated(self, repeated: int) -> None:
        if repeated:
            self.message(
                f"{repeated} combinations left out: they differ from others only in what they do "
                f"not use"
            )

    def _estimate(self, value: Estimate | None, interval: bool) -> str:
        if value is None or math.isnan(value.mean):
            return "-"
        sign = "+-" if self._plain else "±"
        half = f" {sign}{value.half:.3f}" if interval and not math.isnan(value.half) else ""
        return f"{value.mean:.3f}{half}"


def _pair(setting: Setting, rival: str, score: str) -> tuple[float, float]:
    nothing = Estimate(math.nan, math.nan)
    return tuple(setting.metrics.get(f"{view}/{score}", nothing).mean for view in (rival, "global"))  # type: ignore[return-value]


def _facts(record: Record) -> str:
    """What is said of a finished point."""
    settings = {**record["settings"], "seed": record["seed"]}
    metrics = record["metrics"]
    score = next(name for name in metrics if name.startswith("start/")).removeprefix("start/")
    known = [name for name, value in metrics.items() if value is not None]
    scores = [
        f"{view} {metrics[f'{view}/{score}']:.3f}"
        for view in main_views_of(known, score)
        if view != "server"
    ]
    return f"{_described(settings)}  {'  '.join(scores)}"


def _described(settings: Mapping[str, Any]) -> str:
    """Fields by their short names, with their values; without those that are not used."""
    names = short_names(settings)
    return " ".join(f"{names[k]}={v}" for k, v in settings.items() if v is not None)


class _PlainProgress:
    """One line for a finished point, at most one a second, and always the last."""

    def __init__(
        self,
        console: Console,
        pace: SweepPace,
        points: int,
        finished: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self._console, self._pace, self._points, self._finished = console, pace, points, finished
        self._clock = clock
        self._printed_at = -math.inf
        self._pending: Record | None = None

    def __enter__(self) -> "_PlainProgress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What was held back is the last word of an interrupted sweep, too.
        self._print_pending()

    def begin_program(self) -> None:
        self._pace.begin()

    def update(self, rounds: int, points: int | None = None, record: Record | None = None) -> None:
        self._pace.add(rounds)
        self._finished = self._finished if points is None else points
        self._pending = record or self._pending
        if self._clock() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print_pending()

    def _print_pending(self) -> None:
        if self._pending is None:
            return
        left = self._pace.left
        digits = len(str(self._points))
        text = f"{self._finished:>{digits}}/{self._points}  {_facts(self._pending)}"
        text += "" if left is None else f"  {clock_text(left)} left"
        self._console.print(Text(text), soft_wrap=True, highlight=False)
        self._pending = None
        self._printed_at = self._clock()


class _LiveProgress:
    """A bar and the latest point, kept up to date at the bottom of the terminal."""

    def __init__(self, console: Console, pace: SweepPace, points: int, finished: int) -> None:
        self._pace, self._points, self._finished = pace, points, finished
        self._latest: Record | None = None
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

    def begin_program(self) -> None:
        self._pace.begin()

    def update(self, rounds: int, points: int | None = None, record: Record | None = None) -> None:
        self._pace.add(rounds)
        self._finished = self._finished if points is None else points
        self._latest = record or self._latest

    def _render(self) -> RenderableType:
        pace, latest = self._pace, self._latest
        bar = Table.grid(padding=(0, 2, 0, 0), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        left = pace.left
        running = pace.done < pace.total and left is not None
        facts = (
            f"{clock_text(left or 0)} left" if running else f"{clock_text(pace.elapsed)} elapsed"
        )
        bar.add_row(
            Text(f"point {self._finished:>{len(str(self._points))}}/{self._points}", "bold"),
            ProgressBar(total=max(pace.total, 1), completed=pace.done),
            Text(facts, "cyan"),
        )
        if latest is None:
            return bar
        return Group(bar, Text(_facts(latest), "dim", no_wrap=True, overflow="ellipsis"))
