"""What users see in a terminal and in a pipe: tables, messages and progress."""

import dataclasses
import io
import re
import subprocess
import sys

import pytest
from reporting_cases import COSTS, entry, make_history
from rich.console import Console

from fedqsn_jax.reporting.display import Display, bytes_text, fold_path
from fedqsn_jax.reporting.progress import clock_text, make_progress
from fedqsn_jax.reporting.summary import Costs, TensorRow, summarize

ROWS = [
    TensorRow("head/kernel", (256, 10), "float32", "float32, whole"),
    TensorRow("hidden_0/kernel", (64, 256), "float32", "4-bit NormalFloat", 256, 64, 0.36),
    TensorRow("scale", (), "bfloat16", "bfloat16, whole"),
]
LARGE_ROWS = [
    TensorRow("bert/embeddings/word/embedding", (30522, 768), "float32", "float32, whole"),
    TensorRow(
        "bert/encoder/layer_11/attention/self/query/kernel[0]",
        (768, 12, 64),
        "bfloat16",
        "4-bit NormalFloat, block 64, visible columns",
        768,
        768,
        0.51,
    ),
]


@pytest.fixture
def history():
    return make_history()


def pipe(width=80):
    return Console(file=io.StringIO(), width=width)


def terminal(width=120):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")


def without_styles(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def assert_plain(text, width=80):
    assert text.isascii()
    assert set(map(ord, text)) <= {10, *range(32, 127)}
    assert max(map(len, text.split("\n"))) <= width
    assert not any(line.endswith(" ") for line in text.split("\n"))


@pytest.mark.parametrize("rows", [ROWS, LARGE_ROWS])
@pytest.mark.parametrize("make", [pipe, lambda: terminal(80), terminal])
def test_overview_shows_every_number(rows, make):
    console = make()
    Display(console).overview(rows, COSTS)
    text = console.file.getvalue()
    if not console.is_terminal:
        assert_plain(text)
    text = without_styles(text)
    words = text.split()
    for row in rows:
        assert {"x".join(map(str, row.shape)) or "scalar", row.dtype} <= set(words)
        assert {f"{row.parameters:,}", *row.travels.split()} <= set(words)
        if row.columns is not None:
            assert {f"{row.columns:,}", f"{row.fan_in:,}", f"{row.hidden:.1%}"} <= set(words)
        assert all(part in text for part in row.path.split("/"))
    total = sum(row.parameters for row in rows)
    hidden = sum(row.parameters * (row.hidden or 0) for row in rows) / total
    (line,) = (line.split() for line in text.splitlines() if line.startswith("total"))
    columns = sum(row.columns or 0 for row in rows)
    assert line == ["total", f"{total:,}", f"{columns:,}", f"{hidden:.1%}"]
    (down,) = (line.split() for line in text.splitlines() if line.startswith("down"))
    assert down == ["down", "300", "1,000", "30.0%"]
    assert "3.0 MiB" in text
    assert "10 bytes" in text


def test_final_table_in_a_pipe(history):
    console = pipe()
    own = {f"own/global/accuracy{end}": 0.25 for end in ("", "_worst_decile", "_spread")}
    history = [*history[:-1], history[-1] | own]
    Display(console).final_table(summarize(history, COSTS, 10.0))
    text = console.file.getvalue()
    assert_plain(text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "global 0.5000 0.9000 5 0.8750 2.0000 1.0000 0.5000" in lines
    assert "proxy 0.4000 0.7000 5 0.6875 2.2000 1.0000 0.5000" in lines
    assert "+- std 0.0100 0.0600 0.2100" in lines
    assert "attacker_10 0.1000 0.8125 20 0.8125 2.4000 0.5000 0.5000" in lines
    assert "clients' own held-out rows, accuracy mean at end worst tenth spread" in lines
    assert "global 0.2500 0.2500 0.2500" in lines
    assert "never took part" not in text
    assert "down 300 1,000 30.0%" in lines
    assert "up 500 1,400 35.7%" in lines
    assert re.search(r"global - attacker_1 +0\.2500  what the method buys", text)
    assert re.search(r"global - proxy +0\.1875 ", text)
    assert "seconds: 10.0 in the rounds and their evaluations, 0.5 a round" in text


def test_final_table_of_a_run_that_hides_nothing_claims_nothing(history):
    console = pipe()
    costs = dataclasses.replace(COSTS, hides=False)
    Display(console).final_table(summarize(history, costs, 10.0))
    text = console.file.getvalue()
    assert_plain(text)
    assert "buys" not in text
    assert re.search(r"global - attacker_1 +0\.2500  no column is hidden from clients", text)


def test_final_table_in_a_terminal_and_of_a_poor_run():
    console = terminal()
    history = [{"round": 0, "global/likelihood": -7.5}]
    Display(console).final_table(summarize(history, Costs(1, 1, 0, 0), 0.0, "likelihood"))
    text = console.file.getvalue()
    assert "\x1b[" in text
    lines = [line.split() for line in without_styles(text).splitlines()]
    assert ["global", "-7.5000", "-7.5000", "0", "-7.5000", "-", "-", "-"] in lines
    assert ["down", "1", "0", "-"] in lines


def test_what_rounds_to_zero_has_no_sign(history):
    end = history[-1]
    history = [*history[:-1], {**end, "proxy/accuracy": end["global/accuracy"] + 1e-9}]
    summary = summarize(history, COSTS, 10.0)
    assert summary["gaps"]["forgetting"] < 0
    console = pipe()
    Display(console).final_table(summary)
    assert re.search(r"global - proxy +0\.0000  ", console.file.getvalue())


def test_a_notebook_gets_plain_lines(monkeypatch, capsys, history):
    """As in Jupyter's kernel: rich finds it, and it asks programs for colours."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = Display()
    display.overview(ROWS, COSTS)
    with display.progress(20) as progress:
        progress.update(20, history[-1])
    display.final_table(summarize(history, COSTS, 10.0))
    text = capsys.readouterr().out
    assert_plain(text)
    assert "20/20" in text


def test_messages_are_printed_as_they_are():
    console = pipe(20)
    display = Display(console)
    display.message("workdir [bold]/a/very/long/path/to/a/run[/bold] 10")
    display.warning("a long enough warning :smile:")
    assert console.file.getvalue().splitlines() == [
        "workdir [bold]/a/very/long/path/to/a/run[/bold] 10",
        "warning: a long enough warning :smile:",
    ]


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def scores(number):
    return entry(number, (number / 1000, 0.2, 0.3, 0.4, 0.5))


def test_progress_in_a_pipe_is_throttled_but_shows_first_and_last():
    console, clock = pipe(), Clock()
    with make_progress(console, 100, 0, "accuracy", clock) as progress:
        for number in range(1, 101):
            # Calls of ten rounds, one every 0.4 seconds after the first, which compiles.
            if number % 10 == 1:
                clock.now += 30.0 if number == 1 else 0.4
            progress.update(number, scores(number))
            progress.update(number)
    text = console.file.getvalue()
    assert_plain(text)
    caption, header, *lines = text.splitlines()
    assert "accuracy" in caption
    assert header.split() == [
        "round", "global", "server", "proxy", "attacker_10", "rounds/s", "left"
    ]  # fmt: skip
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert rows[0][1:] == ["0.0010", "0.2000", "0.3000", "0.5000", "-", "-"]
    # 25 rounds a second without the compilation; at round 31, 30 are done and 70 are left, of
    # which 0.4 seconds' worth have just passed.
    assert rows[1][-2:] == ["25", "0:00:02"]
    assert rows[-1][-2:] == ["25", "0:00:00"]


def test_interrupted_progress_tells_the_last_round_and_restores_the_terminal():
    def interrupted(console):
        with make_progress(console, 100, 40, "accuracy", Clock()) as progress:
            for number in (50, 60, 70):
                progress.update(number, scores(number))
            raise KeyboardInterrupt

    console = pipe()
    with pytest.raises(KeyboardInterrupt):
        interrupted(console)
    assert [line.split()[0] for line in console.file.getvalue().splitlines()[2:]] == [
        "50/100",
        "70/100",
    ]
    console = terminal()
    with pytest.raises(KeyboardInterrupt):
        interrupted(console)
    text = console.file.getvalue()
    assert "70/100" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("width", [80, 120])
def test_progress_in_a_terminal_shows_pace_and_scores(width):
    console, clock = terminal(width), Clock()
    display = Display(console)
    with make_progress(console, 60, 0, "accuracy", clock) as progress:
        for number in range(10, 60, 10):
            clock.now += 5.0
            progress.update(number, scores(number))
            clock.now += 0.1
        display.message("a message meanwhile")
    frames = without_styles(console.file.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, frames)) <= width
    assert "a message meanwhile" in frames
    bar, last = frames[-2:]
    assert bar.startswith("round 50/60")
    # Ten rounds take 5.1 seconds, of which 0.1 have passed since the last report.
    assert bar.rstrip().endswith("1.96 rounds/s  0:00:05 left")
    assert last.rstrip() == (
        "accuracy  global 0.0500  server 0.2000  proxy 0.3000  attacker_10 0.5000"
    )


def test_dumb_terminals_get_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Display(console).progress(1) as progress:
        progress.update(1, scores(1))
    assert_plain(console.file.getvalue())


def test_small_texts():
    assert [bytes_text(n) for n in (0, 1023, 1024, 1047552, 5.6e9, 2**60)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "1023.0 KiB", "5.2 GiB", "1048576.0 TiB"
    ]  # fmt: skip
    assert fold_path("encoder/layer_0/query/kernel", 16) == "encoder/layer_0/\nquery/kernel"
    assert fold_path("unbreakable", 4) == "unbreakable"
    assert [clock_text(s) for s in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


def test_the_command_line_starts_without_slow_libraries():
    code = (
        "import sys; from fedqsn_jax.reporting import display, writers, summary; "
        "assert not {'matplotlib', 'tensorboardX'} & sys.modules.keys(); "
        "from fedqsn_jax.reporting import plots; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
