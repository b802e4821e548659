"""What a user sees of a sweep: progress over its points, and the table of its settings."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fedqsn_jax.reporting.display import Display
from fedqsn_jax.reporting.progress import Clock, Ongoing, Pace, bar_row, clock_text
from fedqsn_jax.reporting.summary import main_views_of, number
from fedqsn_jax.reporting.tables import Column, natural_width
from fedqsn_jax.sweeps.audits import BENEFIT, SHARE, coalitions
from fedqsn_jax.sweeps.estimates import (
    Estimate,
    Setting,
    pareto_front,
    rival_view,
    score_of,
    short_names,
)

Record = Mapping[str, Any]
"""A finished point: ``settings``, ``seed`` and ``metrics``."""


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
        to_compile = _counted(programs, "program")
        self.message(f"{_counted(points, 'point')}{done}; {to_compile} to compile; in {directory}")

    def groups(self, groups: Sequence[tuple[int, str]], repeated: int = 0) -> None:
        """Shows how many points each compiled program has, and how their clients are run."""
        self._say_repeated(repeated)
        for count, reason in groups:
            self.message(f"{count:>5} points in one compiled program, {reason}")
        self.message(f"{sum(count for count, _ in groups):>5} points in all")

    def sweep_progress(
        self, rounds: tuple[int, int], points: tuple[int, int], programs: int
    ) -> "PointProgress":
        """Shows progress inside a ``with`` block.

        Args:
          rounds: Rounds of all points, and how many are done already.
          points: Points of the sweep, and how many are finished already.
          programs: Compiled programs that the others take.
        """
        return PointProgress(self._console, rounds, points, programs)

    def table_of(self, settings: Sequence[Setting]) -> None:
        """Prints a row a setting: the views' scores and what a client receives.

        Args:
          settings: What was measured; not empty.
        """
        score, attacker = score_of(settings), rival_view(settings, "attacker")
        seeds = max(setting.seeds for setting in settings)
        start = self._estimate(settings[0].metrics[f"start/{score}"], interval=False)
        of_seeds = f"mean of {seeds} seeds with its 95% interval" if seeds > 1 else "one seed"
        self.message(f"\n{score} at the end, {of_seeds}")
        self.message(f"(global before the first round {start})")
        views = ("global", "proxy", attacker)
        front = pareto_front([_pair(setting, attacker, score) for setting in settings])
        stars = [" *" if index in front else "" for index in range(len(settings))]
        names, fields = _columns_apart(settings, stars)
        scores = self._score_columns(settings, score, views, interval=True)
        if natural_width([names, *fields, *scores]) > self._console.width:
            scores = self._score_columns(settings, score, views, interval=False)
        title = names.head
        if natural_width([names, *fields, *scores]) > self._console.width:
            # All fields share a column.
            described = [_described(each.settings) for each in settings]
            cells = [text + star for text, star in zip(described, stars, strict=True)]
            names, fields, title = Column("", cells, right=False), [], "setting"
        self.table(title, names, [*fields, *scores])
        self.message(f"* no other setting is better for global and worse for {attacker}")

    def shares_of(self, settings: Sequence[Setting]) -> None:
        """Prints U and P of every setting, as `audits.with_shares` has them."""
        names, fields = _columns_apart(settings, [""] * len(settings))
        metrics = [BENEFIT, *(f"{SHARE}{who}" for who in coalitions(settings))]
        columns = [
            Column(
                name, [self._estimate(each.metrics.get(name), interval=True) for each in settings]
            )
            for name in metrics
        ]
        self.message(
            "\nU, the kept benefit, and P, the protected share against so many colluding clients "
            "(- where there is nothing to protect)"
        )
        self.table(names.head, names, [*fields, *columns])

    def _score_columns(
        self, settings: Sequence[Setting], score: str, views: Sequence[str], interval: bool
    ) -> list[Column]:
        columns = []
        for view in views:
            estimates = [setting.metrics.get(f"{view}/{score}") for setting in settings]
            cells = [self._estimate(each, interval) for each in estimates]
            columns.append(Column(view.replace("_", " "), cells))
        nothing = Estimate(math.nan, math.nan)
        sent = [each.metrics.get("bytes/down_per_client", nothing).mean for each in settings]
        cells = ["-" if math.isnan(count) else f"{count / 1000:,.1f}" for count in sent]
        return [*columns, Column("KB down", cells)]

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


def _columns_apart(
    settings: Sequence[Setting], stars: Sequence[str]
) -> tuple[Column, list[Column]]:
    """Each field in a column of its own, the first of them as the rows' name."""
    names = short_names(settings[0].settings)
    columns: list[Column] = []
    for field, name in names.items():
        values = [each.settings[field] for each in settings]
        numbers = all(isinstance(value, int | float | None) for value in values)
        cells = ["-" if value is None else str(value) for value in values]
        if not columns:
            cells = [cell + star for cell, star in zip(cells, stars, strict=True)]
        columns.append(Column(name, cells, right=numbers))
    # A sweep of seeds alone has no field.
    first, *others = columns or [Column("", ["all" + star for star in stars], right=False)]
    return first, others


def _facts(record: Record) -> str:
    """What is said of a finished point."""
    settings = {**record["settings"], "seed": record["seed"]}
    metrics = record["metrics"]
    score = next(name for name in metrics if name.startswith("start/")).removeprefix("start/")
    known = [name for name, value in metrics.items() if number(value) is not None]
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


class PointProgress(Ongoing):
    """The points of a sweep: a bar and the latest point, or a line for every finished point."""

    def __init__(
        self,
        console: Console,
        rounds: tuple[int, int],
        points: tuple[int, int],
        programs: int,
        clock: Clock = time.monotonic,
    ) -> None:
        """Starts the clock.

        Args:
          console: Where to write.
          rounds: Rounds of all points, and how many are done already.
          points: Points of the sweep, and how many are finished already.
          programs: Compiled programs that the others take.
          clock: Gives the time.
        """
        self._pace = Pace(*rounds, programs, clock)
        self._points, self._finished = points
        self._latest: Record | None = None
        super().__init__(console, clock)

    def begin_program(self) -> None:
        """Tells that the next program begins, which is going to be compiled."""
        self._pace.begin()

    def update(self, rounds: int, finished: Sequence[Record] = ()) -> None:
        """Tells what is done.

        Args:
          rounds: Finished rounds of all points.
          finished: The points that were finished just now.
        """
        self._pace.add(rounds)
        for record in finished:
            self._finished += 1
            self._latest = record
            self._say(f"{self._count()}  {_facts(record)}{self._left()}")

    def _count(self) -> str:
        return f"{self._finished:>{len(str(self._points))}}/{self._points}"

    def _left(self) -> str:
        left = self._pace.left
        return "" if left is None else f"  {clock_text(left)} left"

    def _still(self) -> str:
        compiling = ", a program is compiled in its first call" if self._pace.compiling else ""
        return f"{self._count()}  {clock_text(self.elapsed)} so far{compiling}{self._left()}"

    def _render(self) -> RenderableType:
        pace, latest = self._pace, self._latest
        running = pace.done < pace.total and pace.left is not None
        facts = self._left().strip() if running else f"{clock_text(self.elapsed)} elapsed"
        bar = bar_row(f"point {self._count()}", pace.done, pace.total, facts)
        if latest is None:
            return bar
        return Group(bar, Text(_facts(latest), "dim", no_wrap=True, overflow="ellipsis"))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
