"""Intervals over seeds, the Pareto front, and the pictures of a sweep."""

import io
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console
from scipy import stats

from fedqsn_jax.sweeps import trade_off
from fedqsn_jax.sweeps.display import PointProgress, SweepDisplay
from fedqsn_jax.sweeps.estimates import Estimate, Setting, estimate, pareto_front, short_names
from fedqsn_jax.sweeps.results import over_seeds


def test_the_interval_is_students():
    values = [0.91, 0.94, 0.92, 0.97]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    mean, half = estimate(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert estimate([0.5]).mean == 0.5
    assert math.isnan(estimate([0.5]).half)
    for diverged in (None, math.nan, math.inf):
        assert all(map(math.isnan, estimate([0.5, diverged])))


def test_the_front_is_what_no_other_surpasses():
    rng = np.random.default_rng(0)
    # Coarse values, so that there are ties.
    points = [tuple(pair) for pair in rng.integers(0, 12, (60, 2)).astype(float)]

    def surpassed(one):
        return any(a <= one[0] and b >= one[1] and (a, b) != one for a, b in points)

    expected = sorted({pair for pair in points if not surpassed(pair)})
    assert [points[index] for index in pareto_front(points)] == expected
    assert pareto_front([(math.nan, 1.0), (0.5, math.nan)]) == []


def test_fields_are_called_by_their_last_names_where_those_differ():
    fields = ["p1", "client.learning_rate", "lora.rank", "server.learning_rate"]
    names = ["p1", "client.learning_rate", "rank", "server.learning_rate"]
    assert list(short_names(fields).items()) == list(zip(fields, names, strict=True))


def some_settings():
    def setting(algorithm, p1, bits, own, attacker, proxy):
        metrics = {
            "global/accuracy": Estimate(own, 0.01),
            "proxy/accuracy": Estimate(proxy, 0.02),
            "attacker_1/accuracy": Estimate(attacker - 0.1, 0.02),
            "attacker_10/accuracy": Estimate(attacker, math.nan),
            "bytes/down_per_client": Estimate(39_600.0, 12.0),
            "start/accuracy": Estimate(0.9, 0.01),
        }
        return Setting({"algorithm": algorithm, "p1": p1, "bits": bits}, 3, metrics)

    return [
        setting("fedavg", 0.0, None, 0.97, 0.97, 0.97),
        setting("fedqsn", 0.2, 4, 0.96, 0.95, 0.94),
        setting("fedqsn", 0.4, 4, 0.93, 0.96, 0.91),
        setting("fedqsn", 0.6, 2, math.nan, math.nan, math.nan),
    ]


def test_one_mark_a_setting_and_one_colour_a_method(tmp_path):
    settings = some_settings()
    figure = trade_off.draw(settings, tmp_path / "picture.png")
    (axes,) = figure.axes
    marks = {line.get_label(): line for line in axes.lines if line.get_marker() != "None"}
    assert {name: len(line.get_xdata()) for name, line in marks.items()} == {
        "fedavg": 1,
        "fedqsn": 3,
    }
    np.testing.assert_array_equal(marks["fedqsn"].get_xdata(), [0.95, 0.96, math.nan])
    np.testing.assert_array_equal(marks["fedqsn"].get_ydata(), [0.96, 0.93, math.nan])
    assert marks["fedavg"].get_color() != marks["fedqsn"].get_color()
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    np.testing.assert_array_equal(front.get_xdata(), [0.95, 0.97])
    assert axes.get_xlabel() == "accuracy of attacker 10"
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000
    other = trade_off.draw(settings, None, "proxy")
    assert other.axes[0].get_xlabel() == "accuracy of proxy"

    # One that collapsed would flatten the rest: it is in a small picture of its own.
    collapsed = settings[1]._replace(
        metrics={**settings[1].metrics, "global/accuracy": Estimate(0.1, 0.0)}
    )
    main, overview = trade_off.draw([*settings, collapsed], None).axes
    assert main.get_ylim()[0] > 0.9
    assert overview.get_ylim()[0] < 0.1


def test_labels_lie_in_the_picture_where_ticks_have_many_digits():
    """As where all settings lie close together."""
    first = some_settings()[0]
    close = [
        first._replace(metrics=first.metrics | {"global/accuracy": Estimate(0.9251 + step, 0.0)})
        for step in (0.0, 0.0004, 0.0008)
    ]
    figure = trade_off.draw(close, None)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    assert max(len(tick.get_text()) for tick in axes.get_yticklabels()) >= len("0.9250")
    assert axes.yaxis.label.get_window_extent().x0 >= 0


def many_fields(collapsed=False):
    """Settings of which all are on the front, and that differ in nine fields."""
    first = some_settings()[0]
    settings = []
    for index in range(12):
        fields = {
            "algorithm": ("fedavg", "fedsn", "fedq", "fedqsn")[index % 4],
            "p1": index / 40,
            "p2": index / 40,
            "bits": 2 + index % 3,
            "block_size": 64,
            "sites": ("all", "residual")[index % 2],
            "lora.rank": 8,
            "lora.public_base": index % 5 == 0,
            "client.trained": ("head", "biases") if index % 3 else (),
            "client.learning_rate": 1e-3,
            "model.pretrained": "a/rather/long/place/of/a/model_with_a_long_name/on_the_disk",
        }
        own = 0.1 if collapsed and index == 11 else 0.9 + index / 200
        values = {"global/accuracy": own, "attacker_10/accuracy": 0.5 + index / 50}
        metrics = {name: Estimate(value, 0.01) for name, value in values.items()}
        settings.append(Setting(fields, 2, first.metrics | metrics))
    return settings


@pytest.mark.parametrize("collapsed", [False, True])
def test_whatever_is_varied_every_name_is_within_the_picture(collapsed):
    settings = many_fields(collapsed)
    figure = trade_off.draw(settings, None)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    axes, *overview = figure.axes
    legend = axes.get_legend()
    (names,) = figure.texts
    texts = [*legend.get_texts(), names]
    boxes = [text.get_window_extent() for text in texts]
    plot = axes.get_window_extent()
    for box in boxes:
        assert plot.x1 < box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    assert names.get_window_extent().y1 <= legend.get_window_extent().y0
    assert len(overview) == collapsed
    for each in overview:
        assert each.get_tightbbox().y1 <= names.get_window_extent().y0
    # Broken into lines, but whole.
    written = names.get_text().replace("\n     ", "").replace(" ", "")
    on_front = settings[:-1] if collapsed else settings
    for setting in on_front:
        assert trade_off._name(setting).replace(" ", "") in written
    # The methods, and what front, pale bars and, if it can be seen, the dashed line are.
    (low, high), line = axes.get_ylim(), np.linspace(*axes.get_xlim(), 1000)
    dashed = bool(((low <= line) & (line <= high)).any())
    methods = {setting.method for setting in settings}
    assert len(legend.get_texts()) == len(methods) + 2 + dashed


def test_the_table_fits_80_columns_and_is_plain_in_a_pipe():
    text = io.StringIO()
    SweepDisplay(Console(file=text, width=80)).table_of(some_settings())
    lines = text.getvalue().splitlines()
    assert text.getvalue().isascii()
    assert max(map(len, lines)) <= 80
    assert "mean of 3 seeds with its 95% interval" in lines[1]
    assert "before the first round 0.900" in lines[2]
    cells = [line.split() for line in lines]
    scores = ["0.970", "+-0.010", "0.970", "+-0.020", "0.970"]
    assert cells[5] == ["fedavg", "*", "0.0", "-", *scores, "39.6"]
    assert cells[8] == ["fedqsn", "0.6", "2", "-", "-", "-", "39.6"]

    text = io.StringIO()
    SweepDisplay(Console(file=text, width=60)).table_of(some_settings())
    assert max(map(len, text.getvalue().splitlines()[3:-1])) <= 60
    assert "+-" not in text.getvalue()

    # Fields that do not fit beside each other share a column.
    text = io.StringIO()
    SweepDisplay(Console(file=text, width=54)).table_of(some_settings())
    table = text.getvalue().splitlines()[3:-1]
    assert max(map(len, table)) <= 54
    assert [line.split() for line in table[2:4]] == [
        ["algorithm=fedavg", "0.970", "0.970", "0.970", "39.6"],
        ["p1=0.0", "*"],
    ]


def test_progress_in_a_pipe_and_in_a_terminal():
    record = {
        "settings": {"algorithm": "fedavg", "bits": None},
        "seed": 1,
        "metrics": {"global/accuracy": 0.5, "attacker_10/accuracy": None, "start/accuracy": 0.4},
    }
    text = io.StringIO()
    with SweepDisplay(Console(file=text, width=80)).sweep_progress((60, 30), (2, 1), 1) as progress:
        progress.begin_program()
        progress.update(45)
        progress.update(60, [record])
    assert text.getvalue() == "2/2  algorithm=fedavg seed=1  global 0.500  0:00:00 left\n"
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True)
    with SweepDisplay(console).sweep_progress((60, 30), (2, 1), 1) as progress:
        progress.update(60, [record])
    assert "point 2/2" in text.getvalue()
    assert "algorithm=fedavg seed=1  global 0.500" in text.getvalue()


def test_every_point_has_a_line_and_a_long_one_gives_signs_of_life():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    def record(seed):
        return {"settings": {}, "seed": seed, "metrics": {"start/accuracy": 0.1}}

    console, clock = Console(file=io.StringIO(), width=80), Clock()
    with PointProgress(console, (80, 0), (4, 0), 2, clock) as progress:
        progress.begin_program()
        clock.now += 4.0
        progress.tick()
        progress.update(60, [record(seed) for seed in range(3)])
    assert console.file.getvalue().splitlines() == [
        "0/4  0:00:04 so far, a program is compiled in its first call",
        *(f"{seed + 1}/4  seed={seed}    0:00:04 left" for seed in range(3)),
    ]


@pytest.mark.parametrize("width", [40, 50])
def test_a_narrow_table_keeps_whole_numbers(width):
    text = io.StringIO()
    SweepDisplay(Console(file=text, width=width)).table_of(some_settings())
    lines = text.getvalue().splitlines()
    assert max(map(len, lines[3:-1])) <= width
    words = " ".join(lines).split()
    assert words.count("39.6") == 4
    assert {"0.960", "0.930", "algorithm=fedqsn"} <= set(words)


def test_a_picture_explains_itself():
    settings = some_settings()
    figure = trade_off.draw(settings, None, "attacker", "digits, 30 rounds")
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert axes.get_title("left").startswith("digits, 30 rounds\n")
    legend = axes.get_legend()
    labels = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    assert labels == [
        "fedavg",
        "fedqsn",
        "Pareto front",
        "as good as the owner's model",
        "95% interval over seeds",
    ]
    bars = [each for each in axes.collections if len(each.get_segments())]
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    assert max(each.get_zorder() for each in bars) < min(line.get_zorder() for line in marks)
    # The column beside the axes is no wider than what stands in it.
    right = max(each.get_window_extent().x1 for each in (legend, *figure.texts))
    assert figure.bbox.width - right < 0.05 * figure.bbox.width
    without = [
        each._replace(metrics={n: Estimate(v.mean, math.nan) for n, v in each.metrics.items()})
        for each in settings
    ]
    legend = trade_off.draw(without, None).axes[0].get_legend()
    assert "95%" not in str([text.get_text() for text in legend.get_texts()])


def test_what_a_point_lacks_is_absent_in_its_setting():
    def record(seed, **more):
        metrics = {"global/accuracy": 0.5, "start/accuracy": 0.1, **more}
        return {"settings": {"p1": 0.1}, "seed": seed, "metrics": metrics}

    (setting,) = over_seeds(
        [record(0), record(1, **{"bytes/down_per_client": 4.0, "train/loss": None})], [{"p1": 0.1}]
    )
    assert setting.metrics["global/accuracy"].mean == 0.5
    assert math.isnan(setting.metrics["bytes/down_per_client"].mean)
    assert math.isnan(setting.metrics["train/loss"].mean)
    text = io.StringIO()
    SweepDisplay(Console(file=text, width=80)).table_of([setting])
    assert text.getvalue().splitlines()[5].split() == ["0.1", "0.500", "+-0.000", "-", "-", "-"]
