"""What users see and what files say: summaries, JSON, TensorBoard, terminal, pictures."""

import io
import json
import math
import re
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto import event_pb2

from fedqsn_jax.reporting import plots
from fedqsn_jax.reporting.display import Display, bytes_text, fold_path
from fedqsn_jax.reporting.files import replacing
from fedqsn_jax.reporting.progress import clock_text, make_progress
from fedqsn_jax.reporting.summary import Costs, TensorRow, main_views_of, summarize, views_of
from fedqsn_jax.reporting.writers import MetricsFile, TensorBoard, write_json

VIEWS = ("global", "server", "proxy", "attacker_1", "attacker_10")
COSTS = Costs(300.0, 700.0, 1000.0, 1400.0, (("server's state", 3 * 2**20), ("rows", 10)))


def entry(round, accuracies, losses=None, **more):
    losses = losses or [1.0] * len(VIEWS)
    scores = {f"{view}/accuracy": a for view, a in zip(VIEWS, accuracies, strict=True)}
    scores |= {f"{view}/loss": loss for view, loss in zip(VIEWS, losses, strict=True)}
    return {"round": round, **scores, "proxy/accuracy_std": 0.01 * (round + 1), **more}


def bytes_of(down, up):
    return {"bytes/down_per_client": down, "bytes/up_per_client": up}


@pytest.fixture
def history():
    return [
        entry(0, (0.50, 0.45, 0.40, 0.10, 0.10), (2.0, 2.1, 2.2, 2.3, 2.4), seconds=0.0),
        entry(5, (0.90, 0.80, 0.70, 0.60, 0.75), **bytes_of(200.0, 600.0), seconds=2.0),
        entry(10, (0.90, 0.85, 0.65, 0.75, 0.80), **bytes_of(400.0, 500.0), seconds=4.0),
        entry(
            20, (0.875, 0.75, 0.6875, 0.625, 0.8125), (0.5,) * 5, **bytes_of(300, 400), seconds=8.0
        ),
    ]


def test_summary_agrees_with_a_hand_computation(history):
    summary = summarize(history, COSTS, seconds=10)
    assert (summary["score"], summary["rounds"]) == ("accuracy", 20)
    assert list(summary["views"]) == list(VIEWS)
    view = summary["views"]["global"]
    assert view["start"] == {"round": 0, "accuracy": 0.5, "loss": 2.0}
    assert view["best"] == {"round": 5, "accuracy": 0.9, "loss": 1.0}  # the earlier of two equals
    assert view["end"] == {"round": 20, "accuracy": 0.875, "loss": 0.5}
    proxy = summary["views"]["proxy"]
    assert proxy["best"] == {"round": 5, "accuracy": 0.7, "accuracy_std": 0.06, "loss": 1.0}
    assert summary["gaps"] == {
        "attack": {"attacker_1": 0.25, "attacker_10": 0.0625},
        "forgetting": 0.1875,
    }
    down, up = summary["bytes"]["down"], summary["bytes"]["up"]
    assert down == {"per_client": 300.0, "expected": 300.0, "fedavg": 1000.0, "ratio": 0.3}
    assert up == {"per_client": 500.0, "expected": 700.0, "fedavg": 1400.0, "ratio": 500 / 1400}
    assert summary["seconds"] == {"total": 10.0, "per_round": 0.5}
    json.dumps(summary, allow_nan=False)


def test_summary_of_a_run_without_rounds_or_attackers():
    only = {"round": 0, "global/accuracy": 0.5, "global/loss": 2.0, "train/loss": None}
    summary = summarize([only], Costs(1, 2, 0, 4), seconds=0)
    assert list(summary["views"]) == ["global"]
    assert summary["gaps"] == {"attack": {}, "forgetting": None}
    assert summary["bytes"]["down"]["ratio"] is None
    assert summary["bytes"]["up"] == {
        "per_client": 2.0,
        "expected": 2.0,
        "fedavg": 4.0,
        "ratio": 0.5,
    }
    assert summary["seconds"]["per_round"] is None
    with pytest.raises(ValueError, match="no entry"):
        summarize([], COSTS, 0)


def test_best_is_by_the_tasks_score_and_ignores_what_is_no_number():
    history = [
        {"round": r, "global/log_likelihood": score, "global/accuracy": 1.0 - r}
        for r, score in enumerate((-3.0, math.nan, -1.0, -2.0, math.inf))
    ]
    summary = summarize(history, COSTS, 1, score="log_likelihood")
    assert summary["views"]["global"]["best"]["round"] == 2
    diverged = summarize(history[1:2], COSTS, 1, score="log_likelihood")
    assert math.isnan(diverged["views"]["global"]["best"]["log_likelihood"])


def test_views_are_in_reading_order():
    names = [f"{view}/accuracy" for view in ("attacker_10", "attacker_2", "server", "global")]
    names += ["train/accuracy", "round", "proxy/loss", "visible/a/kernel"]
    assert views_of(names) == ["global", "server", "attacker_2", "attacker_10"]
    assert main_views_of(names) == ["global", "server", "attacker_10"]
    assert views_of(names, "loss") == ["proxy"]


def read_lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_file_reads_back_exactly(tmp_path, history):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.rewrite(history[:1])
    file.append(history[1:3])
    file.append(history[3:])
    assert read_lines(path) == history
    odd = {"round": np.int64(30), "a": np.float32(0.1), "b": jnp.float32(1 / 3), "c": 0.1 + 0.2}
    file.append([odd | {"nan": math.nan, "inf": np.float32(-np.inf), "none": None}])
    last = read_lines(path)[-1]
    assert last["a"] == float(np.float32(0.1))
    assert np.float32(last["b"]) == np.float32(1 / 3)
    assert last["c"] == 0.1 + 0.2
    assert (last["round"], last["nan"], last["inf"], last["none"]) == (30, None, None, None)


def test_rewrite_replaces_in_one_step(tmp_path, history):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).rewrite(history)
    with path.open() as reader:
        MetricsFile(path).rewrite(history[:2])
        assert len(reader.readlines()) == len(history)  # the old file, undamaged
    assert read_lines(path) == history[:2]
    with pytest.raises(TypeError):
        MetricsFile(path).rewrite([{"round": object()}])
    assert read_lines(path) == history[:2]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_interrupted_replacement_leaves_nothing(tmp_path):
    path = tmp_path / "file"

    def write(text, error):
        with replacing(path) as temporary:
            temporary.write_text(text)
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    write("whole", None)
    assert path.read_text() == "whole"


def test_write_json_is_sorted_and_free_of_nan(tmp_path, history):
    path = tmp_path / "summary.json"
    write_json(path, {"b": (1, np.float32(0.5)), "a": {"c": math.nan}, "path": tmp_path})
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert json.loads(path.read_text()) == {"a": {"c": None}, "b": [1, 0.5], "path": str(tmp_path)}
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def read_events(directory):
    """Scalars ``(tag, step, value, time)`` of all event files; a record is framed by checksums."""
    scalars = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            scalars += [
                (value.tag, event.step, value.simple_value, event.wall_time)
                for value in event.summary.value
            ]
    return scalars


def expected_events(history):
    return sorted(
        (tag, each["round"], np.float32(value))
        for each in history
        for tag, value in each.items()
        if tag != "round"
    )


def test_tensorboard_has_every_scalar_once_after_a_resume(tmp_path, history):
    directory = tmp_path / "tensorboard"
    with TensorBoard(directory) as board:
        board.rewrite(history[:1])
        board.append(history[1:])
        board.append([])
    (directory / "other").write_text("a user's own file")
    assert sorted(event[:3] for event in read_events(directory)) == expected_events(history)

    # The checkpoint was two entries behind when the run stopped; those rounds run again.
    with TensorBoard(directory) as board:
        board.rewrite(history[:2])
        board.append(history[2:])
    events = read_events(directory)
    assert sorted(event[:3] for event in events) == expected_events(history)
    assert (directory / "other").exists()
    times = {step: wall_time for tag, step, _, wall_time in events if tag == "global/loss"}
    assert times[5] - times[0] == pytest.approx(2.0, abs=1e-3)


def test_tensorboard_reopens_without_losing_anything(tmp_path, history):
    board = TensorBoard(tmp_path)
    board.close()
    for each in history:
        board.append([each | {"train/loss": None}])
        board.close()
    assert sorted(event[:3] for event in read_events(tmp_path)) == expected_events(history)


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
    Display(console).final_table(summarize(history, COSTS, 10.0))
    text = console.file.getvalue()
    assert_plain(text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "global 0.5000 0.9000 5 0.8750 2.0000 1.0000 0.5000" in lines
    assert "proxy 0.4000 0.7000 5 0.6875 2.2000 1.0000 0.5000" in lines
    assert "+- std 0.0100 0.0600 0.2100" in lines
    assert "attacker_10 0.1000 0.8125 20 0.8125 2.4000 0.5000 0.5000" in lines
    assert "down 300 1,000 30.0%" in lines
    assert "up 500 1,400 35.7%" in lines
    assert re.search(r"global - attacker_1 +0\.2500 ", text)
    assert re.search(r"global - proxy +0\.1875 ", text)
    assert "seconds: 10.0 in total, 0.5 a round" in text


def test_final_table_in_a_terminal_and_of_a_poor_run():
    console = terminal()
    history = [{"round": 0, "global/likelihood": -7.5}]
    Display(console).final_table(summarize(history, Costs(1, 1, 0, 0), 0.0, "likelihood"))
    text = console.file.getvalue()
    assert "\x1b[" in text
    lines = [line.split() for line in without_styles(text).splitlines()]
    assert ["global", "-7.5000", "-7.5000", "0", "-7.5000", "-", "-", "-"] in lines
    assert ["down", "1", "0", "-"] in lines


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


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count_color(path, color):
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels(path) == wanted).all(axis=-1).sum())


@pytest.mark.parametrize("length", [1, 4])
def test_curves_show_every_view(tmp_path, history, length):
    path = tmp_path / "accuracy.png"
    figure = plots.accuracy_curves(history[:length], path, "a title with $ and _ in it")
    assert pixels(path).shape == (810, 1350, 3)
    for color in ("#000000", "#0072B2", "#009E73", "#CC79A7", "#D55E00"):
        assert count_color(path, color) > 50
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    ends = {view: history[length - 1][f"{view}/accuracy"] for view in VIEWS}
    assert sorted(texts) == sorted(f"{v.replace('_', ' ')}  {a:.3f}" for v, a in ends.items())
    assert [each.name for each in tmp_path.iterdir()] == ["accuracy.png"]


def test_curves_zoom_in_where_colluders_start_at_chance(tmp_path):
    late = [entry(r, (0.97, 0.96, 0.95, 0.90 if r else 0.1, 0.96 if r else 0.1)) for r in range(20)]
    main, strip = plots.accuracy_curves(late, None, "").axes
    assert main.get_ylim()[0] > 0.7
    assert strip.get_ylim()[0] < 0.1
    # Names of curves whose ends lie close together do not overlap.
    places = sorted(text.get_position()[1] for text in main.texts)
    assert min(np.diff(places)) > 0.06
    low = [entry(r, (0.97, 0.96, 0.95, 0.1 + 0.01 * r, 0.2)) for r in range(20)]
    assert len(plots.accuracy_curves(low, None, "").axes) == 1


def test_curves_survive_a_run_that_diverged(tmp_path):
    nan = math.nan
    history = [entry(0, (0.5, 0.4, 0.3, 0.1, 0.1)), entry(1, (nan, nan, 0.2, nan, 0.1))]
    plots.accuracy_curves(history, tmp_path / "a.png", "diverged")
    plots.accuracy_curves([entry(0, (nan,) * 5)], tmp_path / "b.png", "nothing")
    assert pixels(tmp_path / "b.png").std() > 1


def test_a_failed_picture_leaves_the_old_one(tmp_path, history, monkeypatch):
    path = tmp_path / "accuracy.svg"
    plots.accuracy_curves(history, path, "old")
    old = path.read_text()
    assert old.startswith("<?xml")

    def fill_the_disk(figure, file, **settings):
        file.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(plots.Figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        plots.accuracy_curves(history, path, "new")
    assert path.read_text() == old
    assert [each.name for each in tmp_path.iterdir()] == ["accuracy.svg"]


def test_column_picture_has_a_cell_for_each_column(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"wide/kernel": (1, 300), "stack/kernel": (3, 7), "free/kernel": (1, 5)}
    client = {path: rng.random(shape) > 0.3 for path, shape in shapes.items()}
    server = {path: rng.random(shape) > 0.2 for path, shape in shapes.items() if "free" not in path}
    path = tmp_path / "columns.png"
    figure = plots.column_picture(server, client, path)
    assert pixels(path).shape[1] == 1350
    for axes, site in zip(figure.axes, ("wide/kernel", "stack/kernel", "free/kernel"), strict=True):
        shown = np.ma.asarray(axes.collections[0].get_array())
        layers, columns = shapes[site]
        shown = shown.reshape(layers, -1)
        is_visible = client[site] & server.get(site, True)
        np.testing.assert_array_equal(shown[:, :columns] == 0, is_visible)
        np.testing.assert_array_equal(shown[:, :columns] == 2, ~server.get(site, is_visible | True))
        assert shown[:, columns:].mask.all()
        assert f"{columns * layers} columns, {is_visible.sum()} visible" in axes.get_title("left")
    none = {site: np.ones_like(mask) for site, mask in client.items()}
    plots.column_picture(none, none, tmp_path / "none.png")
    for color in ("#E69F00", "#1A1A1A"):
        assert count_color(path, color) > 2 * count_color(tmp_path / "none.png", color)


def test_the_command_line_starts_without_slow_libraries():
    code = (
        "import sys; from fedqsn_jax.reporting import display, writers, summary; "
        "assert not {'matplotlib', 'tensorboardX'} & sys.modules.keys(); "
        "from fedqsn_jax.reporting import plots; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
