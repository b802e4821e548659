"""What a user sees in the terminal: the model and its costs, progress, the final table.

In a terminal there are colours and lines; in a pipe (a log file, a batch job, a notebook) there is
plain ASCII without control codes. Everything fits into 80 columns.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table
from rich.text import Text

from fedqsn_jax.host.console import standard_console
from fedqsn_jax.reporting.progress import Progress, make_progress
from fedqsn_jax.reporting.summary import Costs, TensorRow

_ASCII_RULES = box.Box(
    # Like box.SIMPLE, which has no equivalent in ASCII that leaves out the vertical lines.
    "    \n    \n -- \n    \n    \n -- \n    \n    \n",
    ascii=True,
)
_SHORTEST_PATH = 12
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class Display:
    """Writes everything that a run tells its user while it goes on.

    Example::

      display = Display()
      display.overview(rows, costs)
      with display.progress(total=60) as progress:
          progress.update(5, metrics)
      display.final_table(summarize(history, costs, seconds))
    """

    def __init__(self, console: Console | None = None) -> None:
        """Writes to standard output, or to a console of the caller's."""
        self._console = console or standard_console()
        self._plain = not self._console.is_terminal or self._console.options.ascii_only

    def message(self, text: str) -> None:
        """Prints a line of text as it is; the terminal wraps it, so paths can be copied."""
        self._console.print(Text(text), soft_wrap=True, highlight=False)

    def warning(self, text: str) -> None:
        """Prints a line of text that should not be overlooked."""
        line = Text.assemble(("warning:", "bold yellow"), f" {text}")
        self._console.print(line, soft_wrap=True, highlight=False)

    def overview(self, rows: Sequence[TensorRow], costs: Costs) -> None:
        """Prints the parameter tensors, how each travels, and what a round costs.

        Args:
          rows: The tensors, in order.
          costs: Expected bytes of a client in a round, and estimates of memory.
        """
        self._print_tensors(rows)
        self._print_bytes(
            "expected bytes of a client in a round",
            {"down": (costs.down, costs.fedavg_down), "up": (costs.up, costs.fedavg_up)},
        )
        if costs.memory:
            self.message("\nestimated memory:")
        width = max((len(purpose) for purpose, _ in costs.memory), default=0)
        for purpose, count in costs.memory:
            self.message(f"  {purpose:<{width}}  {bytes_text(count):>10}")
        self.message("")

    def progress(self, total: int, start: int = 0, score: str = "accuracy") -> Progress:
        """Shows progress inside a ``with`` block; tell it of rounds by ``update(round, metrics)``.

        Args:
          total: Number of rounds in all.
          start: Number of rounds that are done already.
          score: The metric that is shown for the views: global, server, proxy, largest attacker.
        """
        return make_progress(self._console, total, start, score)

    @contextmanager
    def steps(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows the progress of something that is counted, in a terminal by a bar.

        Args:
          what: What is going on.
          total: The count at its end.

        Yields:
          A function that is told how many more are done.
        """
        if self._plain:
            self.message(f"{what}: {total} in all")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with bars.Progress(
            *columns,
            bars.TimeRemainingColumn(),
            console=self._console,
            disable=self._plain,
            transient=True,
        ) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)

    def final_table(self, summary: Mapping[str, Any]) -> None:
        """Prints what a run came to.

        Args:
          summary: What `summary.summarize` returned.
        """
        self.message("")
        score = summary["score"]
        table = self._table()
        table.add_column("view")
        for head in (
            *(f"{score}\nstart", "\nbest", "\nround", "\nend"),
            *("loss\nstart", "\nat best", "\nend"),
        ):
            table.add_column(head, justify="right", no_wrap=True)
        for view, facts in summary["views"].items():
            times = [facts["start"], facts["best"], facts["end"]]
            start, best, end = (_decimal(each.get(score)) for each in times)
            losses = [_decimal(each.get("loss")) for each in times]
            table.add_row(Text(view, "bold"), start, best, str(times[1]["round"]), end, *losses)
            if f"{score}_std" in facts["end"]:
                start, best, end = (_decimal(each.get(f"{score}_std")) for each in times)
                table.add_row(Text("  +- std" if self._plain else "  ± std"), start, best, "", end)
        self._print_table(table)
        self.message("")
        self._print_clients(summary)
        self._print_gaps(summary)
        self._print_texts(summary.get("texts", {}))
        self._print_bytes(
            "bytes of a client in a round",
            {
                way: (facts["per_client"], facts["fedavg"])
                for way, facts in summary["bytes"].items()
            },
        )
        self.message("")
        total, each = summary["seconds"]["total"], summary["seconds"]["per_round"]
        pace = "" if each is None else f", {each:.3g} a round"
        self.message(f"seconds: {total:.1f} in the rounds and their evaluations{pace}")

    def _print_texts(self, metrics: Mapping[str, float]) -> None:
        """The scores of what the views wrote."""
        if not metrics:
            return
        views = dict.fromkeys(name.partition("/")[0] for name in metrics)
        scores = dict.fromkeys(name.partition("/")[2] for name in metrics)
        shown = [score for score in scores if not score.endswith("_std")]
        table = self._table()
        table.add_column("texts after the last round")
        for score in shown:
            table.add_column(score, justify="right", no_wrap=True)
        for view in views:
            values = (metrics.get(f"{view}/{score}") for score in shown)
            table.add_row(Text(view, "bold"), *("-" if v is None else f"{v:.2f}" for v in values))
        self._print_table(table)
        self.message("")

    def _print_clients(self, summary: Mapping[str, Any]) -> None:
        titles = {"own": "clients' own held-out rows", "new": "clients that never took part"}
        for group, views in summary["clients"].items():
            table = self._table()
            table.add_column(f"{titles[group]}, {summary['score']}")
            for head in ("mean at end", "worst tenth", "spread"):
                table.add_column(head, justify="right", no_wrap=True)
            for view, facts in views.items():
                values = (_decimal(facts[name]) for name in ("mean", "worst_decile", "spread"))
                table.add_row(Text(view, "bold"), *values)
            self._print_table(table)
            self.message("")

    def _print_gaps(self, summary: Mapping[str, Any]) -> None:
        gaps = summary["gaps"]
        attack, forgetting = (
            ("what the method buys against such colluders", "what a client that forgets loses")
            if summary["hides"]
            else 2 * ("no column is hidden from clients",)
        )
        lines = [(f"global - {view}", gap, attack) for view, gap in gaps["attack"].items()]
        lines.append(("global - proxy", gaps["forgetting"], forgetting))
        lines = [line for line in lines if line[1] is not None]
        if lines:
            self.message(f"gaps in {summary['score']} at the end:")
        width = max((len(name) for name, _, _ in lines), default=0)
        for name, gap, meaning in lines:
            self.message(f"  {name:<{width}}  {_decimal(gap):>7}  {meaning}")
        if lines:
            self.message("")

    def _print_tensors(self, rows: Sequence[TensorRow]) -> None:
        width = self._console.width
        paths = [row.path for row in rows]
        table = self._tensor_table(rows, paths, None)
        marks: dict[str, str] = {}
        if self._natural_width(table) > width:
            # The words would take a third of the width; letters stand for them instead.
            ways = dict.fromkeys(row.travels for row in rows)
            marks = {words: _letter(index) for index, words in enumerate(ways)}
            table = self._tensor_table(rows, paths, marks)
        excess = self._natural_width(table) - width
        if excess > 0:
            longest = max(len("tensor"), *(len(path) for path in paths))
            room = max(longest - excess, _SHORTEST_PATH)
            table = self._tensor_table(rows, [fold_path(path, room) for path in paths], marks)
        self._print_table(table)
        for words, mark in marks.items():
            self.message(f"  {mark}: {words}")
        self.message("")

    def _tensor_table(
        self, rows: Sequence[TensorRow], paths: Iterable[str], marks: Mapping[str, str] | None
    ) -> Table:
        table = self._table(show_footer=True)
        total = sum(row.parameters for row in rows)
        hidden = sum(row.parameters * (row.hidden or 0) for row in rows)
        table.add_column("tensor", "total", overflow="fold")
        table.add_column("shape", no_wrap=True)
        table.add_column("dtype", no_wrap=True)
        for head, foot in (
            ("parameters", f"{total:,}"),
            ("columns", f"{sum(row.columns or 0 for row in rows):,}"),
            ("fan-in", ""),
            ("hidden", _share(hidden / total if total else 0.0)),
        ):
            table.add_column(head, foot, justify="right", no_wrap=True)
        table.add_column("travels as" if marks is None else "as")
        for row, path in zip(rows, paths, strict=True):
            table.add_row(
                Text(path, "bold" if row.columns is not None else ""),
                "x".join(map(str, row.shape)) or "scalar",
                row.dtype,
                f"{row.parameters:,}",
                "" if row.columns is None else f"{row.columns:,}",
                "" if row.fan_in is None else f"{row.fan_in:,}",
                "" if row.hidden is None else _share(row.hidden),
                Text(row.travels if marks is None else marks[row.travels]),
            )
        return table

    def _print_bytes(
        self, title: str, ways: Mapping[str, tuple[float | None, float | None]]
    ) -> None:
        table = self._table()
        table.add_column(title)
        for head in ("this run", "FedAvg", "ratio"):
            table.add_column(head, justify="right", no_wrap=True)
        for way, (ours, fedavg) in ways.items():
            ratio = _share(ours / fedavg) if ours is not None and fedavg else "-"
            table.add_row(way, _whole(ours), _whole(fedavg), Text(ratio, "bold"))
        self._print_table(table)

    def _table(self, show_footer: bool = False) -> Table:
        return Table(
            box=_ASCII_RULES if self._plain else box.SIMPLE,
            show_edge=False,
            show_footer=show_footer,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )

    def _print_table(self, table: Table) -> None:
        if not self._plain:
            self._console.print(table, highlight=False)
            return
        with self._console.capture() as capture:
            self._console.print(table, highlight=False)
        for line in capture.get().splitlines():
            self.message(line.rstrip())

    def _natural_width(self, table: Table) -> int:
        unlimited = self._console.options.update(width=10_000)
        return self._console.measure(table, options=unlimited).maximum


def silent_display() -> Display:
    """Returns a display that shows nothing: for processes that are not the ones to speak."""
    return Display(Console(quiet=True))


def bytes_text(count: float) -> str:
    """Returns a number of bytes in the unit that suits it, for example ``1.2 MiB``."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def fold_path(path: str, width: int) -> str:
    """Breaks a path into lines of at most ``width`` after its slashes, as far as it has them."""
    lines = [""]
    parts = path.split("/")
    for index, part in enumerate(parts):
        piece = part + "/" * (index < len(parts) - 1)
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _letter(index: int) -> str:
    """a to z, then aa to az, and so on."""
    rest, last = divmod(index, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("a") + last)


def _decimal(value: float | None) -> str:
    # "z": what is rounded to zero has no sign.
    return "-" if value is None else f"{value:z.4f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
