"""Pictures: every view, every column, and no half-written file."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from reporting_cases import VIEWS, entry, make_history

from fedqsn_jax.reporting import plots


@pytest.fixture
def history():
    return make_history()


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


def test_what_is_absent_is_a_gap(history):
    history[1] = {name: v for name, v in history[1].items() if name != "proxy/accuracy"}
    history[2] = history[2] | {"proxy/accuracy": None, "server/accuracy": math.inf}
    del history[-1]["proxy/accuracy_std"]
    axes = plots.accuracy_curves(history, None, "").axes[0]
    proxy = next(line for line in axes.lines if line.get_color() == "#009E73").get_ydata()
    np.testing.assert_array_equal(np.isnan(proxy), [False, True, True, False])
    server = next(line for line in axes.lines if line.get_color() == "#0072B2").get_ydata()
    assert math.isnan(server[2])


def test_pictures_do_not_depend_on_a_display(tmp_path):
    """MPLBACKEND names a backend that is not there; a process, as it is read at the import."""
    code = (
        "import os, sys; from fedqsn_jax.reporting import plots; "
        "plots.accuracy_curves([{'round': 0, 'global/accuracy': .5}], sys.argv[1], ''); "
        "assert os.environ['MPLBACKEND'] == 'nonsense'"
    )
    path = tmp_path / "accuracy.png"
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
    assert pixels(path).shape == (810, 1350, 3)


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
