"""What users see in a terminal and in a pipe: tables, messages and progress."""

import dataclasses
import io
import re
import subprocess
import sys

import pytest
from reporting_cases import COSTS, entry, make_history
from rich.console import Console

from fedqsn_jax.reporting.display import Display, bytes_text, draw_safely
from fedqsn_jax.reporting.summary import Costs, TensorRow, summarize
from fedqsn_jax.reporting.tables import fold_path

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
        progress.update(20, history[-1:])
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


def test_dumb_terminals_get_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Display(console).progress(1) as progress:
        progress.update(1, [entry(1, (0.1, 0.2, 0.3, 0.4, 0.5))])
    assert_plain(console.file.getvalue())


def test_small_texts():
    assert [bytes_text(n) for n in (0, 1023, 1024, 1047552, 5.6e9, 2**60)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "1023.0 KiB", "5.2 GiB", "1048576.0 TiB"
    ]  # fmt: skip
    assert fold_path("encoder/layer_0/query/kernel", 16) == "encoder/layer_0/\nquery/kernel"
    assert fold_path("unbreakable", 4) == "unbreakable"


def test_the_command_line_starts_without_slow_libraries():
    code = (
        "import sys; from fedqsn_jax.reporting import display, writers, summary; "
        "assert not {'matplotlib', 'tensorboardX'} & sys.modules.keys(); "
        "from fedqsn_jax.reporting import plots; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("width", [40, 50])
@pytest.mark.parametrize("make", [pipe, terminal])
def test_a_narrow_console_keeps_names_and_whole_numbers(make, width, history):
    console = make(width)
    own = {f"own/global/accuracy{end}": 0.25 for end in ("", "_worst_decile", "_spread")}
    history = [*history[:-1], history[-1] | own]
    Display(console).overview(LARGE_ROWS, COSTS)
    Display(console).final_table(summarize(history, COSTS, 10.0))
    text = without_styles(console.file.getvalue())
    tables = [
        line for line in text.splitlines() if not line.startswith(("gaps", "  global", "sec"))
    ]
    tables = [line for line in tables if "estimated" not in line and "4-bit" not in line]
    assert max(len(line.rstrip()) for line in tables) <= width
    rows = [line.split() for line in text.splitlines()]
    found = [row[1:] for row in rows if row[:1] == ["attacker_10"]]
    assert [cell for row in found for cell in row] == [
        "0.1000", "0.8125", "20", "0.8125", "2.4000", "0.5000", "0.5000"
    ]  # fmt: skip
    assert ["down", "300", "1,000", "30.0%"] in rows
    assert {"30522x768", "23,440,896", "768x12x64", "51.0%"} <= set(text.split())
    assert ["global", "0.2500", "0.2500", "0.2500"] in rows
    assert "…" not in text


def test_what_is_absent_or_no_number_is_a_dash(history):
    nan = float("nan")
    end = history[-1] | {"global/accuracy": nan, "proxy/loss": None, "own/global/accuracy": nan}
    console = pipe()
    summary = summarize([*history[:-1], end], COSTS, 1.0)
    Display(console).final_table(summary | {"texts": {"global/bleu": nan}})
    text = console.file.getvalue()
    assert "nan" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["global", "0.5000", "0.9000", "5", "-", "2.0000", "1.0000", "0.5000"] in rows
    assert ["global", "-", "-", "-"] in rows


def test_a_picture_that_fails_is_one_line(history):
    console = pipe()

    def draw():
        raise ValueError("no such\nbackend")

    draw_safely(Display(console), "accuracy.png", draw)
    assert console.file.getvalue() == (
        "warning: accuracy.png was not drawn: ValueError: no such backend\n"
    )
