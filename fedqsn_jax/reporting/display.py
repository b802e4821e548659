"""What a user sees in the terminal: the model and its costs, progress, the final table.

In a terminal there are colours and lines; in a pipe (a log file, a batch job, a notebook) there is
plain ASCII without control codes. Everything fits into 80 columns; where there are fewer, tables
are split rather than cut.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from fedqsn_jax.host.console import standard_console
from fedqsn_jax.reporting.progress import RoundProgress, Steps, Waiting
from fedqsn_jax.reporting.summary import Costs, TensorRow, number, privacy_line
from fedqsn_jax.reporting.tables import Column, make_tables, natural_width

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class Display:
    """Writes everything that a run tells its user while it goes on.

    Example::

      display = Display()
      display.overview(rows, costs)
      with display.progress(total=60) as progress:
          progress.update(5, [metrics])
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

    def progress(self, total: int, start: int = 0, score: str = "accuracy") -> RoundProgress:
        """Shows the progress of rounds inside a ``with`` block; tell it of them by ``update``.

        Args:
          total: Number of rounds in all.
          start: Number of rounds that are done already.
          score: The metric that is shown for the views: global, server, proxy, largest attacker.
        """
        return RoundProgress(self._console, total, start, score)

    def steps(self, what: str, total: int) -> Steps:
        """Shows the progress of something that is counted, inside a ``with`` block.

        Args:
          what: What is going on.
          total: The count at its end; tell by ``add`` how many more are done.
        """
        return Steps(self._console, what, total)

    def waiting(self, what: str) -> Waiting:
        """Shows that something is going on inside a ``with`` block, and for how long.

        Example::

          with display.waiting("loading the data"):
              rows = load()

        Args:
          what: What is going on.
        """
        return Waiting(self._console, what)

    def table(self, title: str, names: Column, columns: Sequence[Column]) -> None:
        """Prints a table of rows with names, or several where one would be too wide.

        Args:
          title: What stands above the names.
          names: The rows' names.
          columns: The other columns.
        """
        for part in make_tables(title, names, columns, self._console.width, self._plain):
            if isinstance(part, str):
                self.message(part)
            elif not self._plain:
                self._console.print(part, highlight=False)
            else:
                with self._console.capture() as capture:
                    self._console.print(part, highlight=False)
                for line in capture.get().splitlines():
                    self.message(line.rstrip())

    def final_table(self, summary: Mapping[str, Any]) -> None:
        """Prints what a run came to, and the verdict on it.

        Args:
          summary: What `summary.summarize` returned; with the ``verdict`` of `verdict.verdict`,
            ``texts``, the scores of what the views wrote, ``kept_benefit`` and ``fine_tuned``, if
            there are such.
        """
        self.message("")
        self._print_views(summary["views"], summary["score"])
        self._print_clients(summary)
        self._print_gaps(summary)
        self._print_benefit(summary)
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
        if summary.get("privacy"):
            self.message(privacy_line(summary["privacy"]))
        if "verdict" in summary:
            self.message("")
            for line in textwrap.wrap(summary["verdict"]["text"], self._console.width):
                self.message(line)

    def _print_views(self, views: Mapping[str, Any], score: str) -> None:
        """What each view had at the start, at its best, and at the end; its spread below it."""
        names: list[Text] = []
        rows: list[list[str]] = []
        for view, facts in views.items():
            times = [facts["start"], facts["best"], facts["end"]]
            start, best, end = (_decimal(each.get(score)) for each in times)
            losses = [_decimal(each.get("loss")) for each in times]
            names.append(Text(view, "bold"))
            rows.append([start, best, str(times[1]["round"]), end, *losses])
            if f"{score}_std" in facts["end"]:
                start, best, end = (_decimal(each.get(f"{score}_std")) for each in times)
                names.append(Text("  +- std" if self._plain else "  ± std"))
                rows.append([start, best, "", end, "", "", ""])
        heads = [(score, head) for head in ("start", "best", "round", "end")]
        heads += [("loss", head) for head in ("start", "at best", "end")]
        columns = [
            Column(head, [row[index] for row in rows], group)
            for index, (group, head) in enumerate(heads)
        ]
        self.table("view", Column("", names, right=False), columns)
        self.message("")

    def _print_texts(self, metrics: Mapping[str, float]) -> None:
        """The scores of what the views wrote."""
        if not metrics:
            return
        views = dict.fromkeys(name.partition("/")[0] for name in metrics)
        scores = dict.fromkeys(name.partition("/")[2] for name in metrics)
        columns = []
        for score in scores:
            if not score.endswith("_std"):
                values = [number(metrics.get(f"{view}/{score}")) for view in views]
                columns.append(Column(score, ["-" if v is None else f"{v:.2f}" for v in values]))
        self.table("texts after the last round", _bold(views), columns)
        self.message("")

    def _print_clients(self, summary: Mapping[str, Any]) -> None:
        titles = {"own": "clients' own held-out rows", "new": "clients that never took part"}
        heads = {"mean": "mean at end", "worst_decile": "worst tenth", "spread": "spread"}
        for group, views in summary["clients"].items():
            columns = [
                Column(head, [_decimal(facts[name]) for facts in views.values()])
                for name, head in heads.items()
            ]
            self.table(f"{titles[group]}, {summary['score']}", _bold(views), columns)
            self.message("")

    def _print_gaps(self, summary: Mapping[str, Any]) -> None:
        gaps = summary["gaps"]
        attack, forgetting = (
            ("what the method buys against such colluders", "what a client that forgets loses")
            if summary["hides"]
            else 2 * ("no column is hidden from clients",)
        )
        lines = [(f"global - {view}", gap, attack) for view, gap in gaps["attack"].items()]
        trained = summary.get("fine_tuned", {}).get("attackers", {})
        for view, gap in gaps.get("fine_tuned", {}).items():
            rows = trained[view]["rows"]
            lines.append((f"global - {view}, trained", gap, f"after training on {rows} own rows"))
        lines.append(("global - proxy", gaps["forgetting"], forgetting))
        lines = [line for line in lines if number(line[1]) is not None]
        if lines:
            self.message(f"gaps in {summary['score']} at the end:")
        width = max((len(name) for name, _, _ in lines), default=0)
        for name, gap, meaning in lines:
            self.message(f"  {name:<{width}}  {_decimal(gap):>7}  {meaning}")
        if lines:
            self.message("")

    def _print_benefit(self, summary: Mapping[str, Any]) -> None:
        """What the run kept of FedAvg's benefit, where that is known."""
        kept = summary.get("kept_benefit")
        if not kept:
            return
        start, end, fedavg = (_decimal(kept[name]) for name in ("start", "end", "fedavg"))
        value = "unknown, as FedAvg gained nothing" if kept["value"] is None else ""
        self.message(
            f"kept benefit U: {value or _decimal(kept['value'])}  from {start} to {end}, where "
            f"FedAvg came to {fedavg}"
        )
        self.message("")

    def _print_tensors(self, rows: Sequence[TensorRow]) -> None:
        total = sum(row.parameters for row in rows)
        hidden = sum(row.parameters * (row.hidden or 0) for row in rows)
        paths = [Text(row.path, "bold" if row.columns is not None else "") for row in rows]
        names = Column("", paths, right=False, foot="total")
        columns = [
            Column("shape", ["x".join(map(str, row.shape)) or "scalar" for row in rows], "", False),
            Column("dtype", [row.dtype for row in rows], "", False),
            Column("parameters", [f"{row.parameters:,}" for row in rows], foot=f"{total:,}"),
            Column(
                "columns",
                ["" if row.columns is None else f"{row.columns:,}" for row in rows],
                foot=f"{sum(row.columns or 0 for row in rows):,}",
            ),
            Column("fan-in", ["" if row.fan_in is None else f"{row.fan_in:,}" for row in rows]),
            Column(
                "hidden",
                ["" if row.hidden is None else _share(row.hidden) for row in rows],
                foot=_share(hidden / total if total else 0.0),
            ),
        ]
        ways = [row.travels for row in rows]
        marks: dict[str, str] = {}
        whole = [names, *columns, Column("travels as", ways)]
        if natural_width(whole) > self._console.width:
            # The words would take a third of the width; letters stand for them instead.
            marks = {words: _letter(index) for index, words in enumerate(dict.fromkeys(ways))}
            columns.append(Column("as", [marks[way] for way in ways], "", False))
        else:
            columns.append(Column("travels as", ways, "", False))
        self.table("tensor", names, columns)
        for words, mark in marks.items():
            self.message(f"  {mark}: {words}")
        self.message("")

    def _print_bytes(
        self, title: str, ways: Mapping[str, tuple[float | None, float | None]]
    ) -> None:
        ours, fedavg = (list(column) for column in zip(*ways.values(), strict=True))
        ratios = [
            _share(one / other) if one is not None and other else "-"
            for one, other in zip(ours, fedavg, strict=True)
        ]
        columns = [
            Column("this run", [_whole(each) for each in ours]),
            Column("FedAvg", [_whole(each) for each in fedavg]),
            Column("ratio", [Text(each, "bold") for each in ratios]),
        ]
        self.table(title, Column("", list(ways), right=False), columns)


def _bold(names: Iterable[str]) -> Column:
    return Column("", [Text(name, "bold") for name in names], right=False)


def draw_safely(display: Display, what: str, draw: Callable[[], object]) -> None:
    """Draws a picture; where that fails there is a line of warning, and nothing else is lost.

    Args:
      display: Where the line is printed, and that it takes a while.
      what: The name of the picture.
      draw: Draws and writes it.
    """
    try:
        with display.waiting(f"drawing {what}"):
            draw()
    except Exception as error:
        # Of whatever kind: the results stand, and a picture can be made again from them.
        display.warning(
            f"{what} was not drawn: {type(error).__name__}: {' '.join(str(error).split())}"
        )


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


def _letter(index: int) -> str:
    """a to z, then aa to az, and so on."""
    rest, last = divmod(index, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("a") + last)


def _decimal(value: float | None) -> str:
    # "z": what is rounded to zero has no sign.
    return "-" if number(value) is None else f"{value:z.4f}"


def _whole(value: float | None) -> str:
    return "-" if number(value) is None else f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
