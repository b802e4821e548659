"""Pictures: the curves of all views, and the columns that one client sees.

Importing this takes a third of a second, for Matplotlib; import it where a picture is made. Nothing
here touches pyplot or its global state.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.reporting.matplotlib_parts import (
    Axes,
    Figure,
    FigureCanvasAgg,
    ListedColormap,
    MaxNLocator,
    Patch,
)
from fedqsn_jax.reporting.summary import Metrics, number, views_of

_DPI = 150
_CURVES_SIZE = (9.0, 5.4)
_PICTURE_WIDTH = 9.0
_CELLS_A_LINE = 128
_TALLEST = 100.0
_MOST_WIDENING = 2.5

# Okabe and Ito's palette, which colour-blind readers can tell apart; the dashes do so in grey.
_LINES = {
    "global": ("#000000", "-", 2.2),
    "server": ("#0072B2", (0, (6, 1.5)), 1.6),
    "proxy": ("#009E73", "-", 1.6),
}
_ATTACKER_COLORS = ("#CC79A7", "#D55E00", "#E69F00", "#56B4E9")
_ATTACKER_DASHES = ((0, (1.2, 1.2)), (0, (4, 1.5, 1, 1.5)), (0, (3, 3)))

# From light to dark, so that they differ in grey as well.
_KINDS = (
    ("visible to this client", "#BFE3F7"),
    ("hidden from this client in this round", "#E69F00"),
    ("hidden by the server for good", "#1A1A1A"),
)


def accuracy_curves(
    history: Sequence[Metrics],
    path: str | os.PathLike[str] | None,
    title: str,
    score: str = "accuracy",
) -> Figure:
    """Draws the score of every view over the rounds, the proxy's with its spread over masks.

    Colluders begin at chance and are soon close to the rest. Where that would flatten everything
    else, the upper axes show the range in which the views end, and a strip below the whole range.

    Args:
      history: The metrics of the evaluated rounds, in order.
      path: Where to write it, in the place of what is there; None: nowhere.
      title: What was run.
      score: The metric to draw.

    Returns:
      The figure.
    """
    rounds = np.array([entry["round"] for entry in history], float)
    names = {name for entry in history for name, value in entry.items() if value is not None}
    views = views_of(names, score)
    curves = {view: _series(history, f"{view}/{score}") for view in views}
    spreads = {
        view: _series(history, f"{view}/{score}_std")
        for view in views
        if any(f"{view}/{score}_std" in entry for entry in history)
    }
    whole, zoomed = _score_ranges(curves, spreads)
    figure = new_figure(_CURVES_SIZE)
    if zoomed is None:
        main = figure.subplots()
        all_axes = [main]
    else:
        main, strip = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        all_axes = [main, strip]
        strip.axhspan(*zoomed, color="#000000", alpha=0.07, lw=0)
        strip.set_ylim(whole)
        strip.set_ylabel("whole range", fontsize=8)
        strip.yaxis.set_major_locator(MaxNLocator(3))
    # Room for the labels on the right; a fixed layout keeps the picture's size exact.
    figure.subplots_adjust(left=0.09, right=0.78, top=0.92, bottom=0.1, hspace=0.08)
    for axes in all_axes:
        for view, values in curves.items():
            color, dashes, width = _line_of(view, views)
            _draw_curve(axes, rounds, values, color, dashes, width)
            if view in spreads:
                low, high = values - spreads[view], values + spreads[view]
                axes.fill_between(rounds, low, high, color=color, alpha=0.18, lw=0)
        axes.grid(color="#DDDDDD", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    main.set_ylim(zoomed or whole)
    main.set_ylabel(score)
    main.set_title(title, loc="left", parse_math=False)
    all_axes[-1].set_xlabel("round")
    # A single round would stand on a range of no width.
    margin = 0.5 if len(rounds) == 1 else 0.0
    all_axes[-1].set_xlim(rounds[0] - margin, rounds[-1] + margin)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _label_ends(main, curves, views)
    save_figure(figure, path)
    return figure


def column_picture(
    server_visible: Mapping[str, Any],
    client_visible: Mapping[str, Any],
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws which columns of every site one client sees, one cell a column.

    Long layers go on in the next line, and every layer of a stack begins a new one.

    Args:
      server_visible: bool ``[layers, columns]`` a site; False where the server hides the column. A
        site that only the other argument has is not hidden by this mask.
      client_visible: The same for what the client sees in this round. It may, but need not, be
        False as well where the server hides the column.
      path: Where to write it, in the place of what is there; None: nowhere.

    Returns:
      The figure.
    """
    kinds = {
        site: _kinds_of(server_visible.get(site), client_visible.get(site))
        for site in dict.fromkeys([*server_visible, *client_visible])
    }
    cells = min(_CELLS_A_LINE, max(each.shape[1] for each in kinds.values()))
    grids = {site: _wrap(each, cells) for site, each in kinds.items()}
    cell = min(0.22, (_PICTURE_WIDTH - 0.5) / cells)
    heights = [0.32 + cell * len(grid) for grid in grids.values()]
    height = sum(heights) + 0.5
    figure = new_figure((_PICTURE_WIDTH, min(height, _TALLEST)))
    top = height - 0.05
    for (site, grid), needed in zip(grids.items(), heights, strict=True):
        # Placed by hand, in shares of the figure: cells have the same size in every site.
        box = (0.25, top - needed, cell * cells, cell * len(grid))
        axes = figure.add_axes(
            (box[0] / _PICTURE_WIDTH, box[1] / height, box[2] / _PICTURE_WIDTH, box[3] / height)
        )
        colors = ListedColormap([color for _, color in _KINDS])
        axes.pcolormesh(grid, cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=0.4)
        axes.invert_yaxis()
        axes.set_axis_off()
        counts = [int((kinds[site] == kind).sum()) for kind in range(len(_KINDS))]
        text = f"{site}: {kinds[site].size} columns, {counts[0]} visible, "
        text += f"{counts[1]} hidden in this round, {counts[2]} hidden for good"
        axes.set_title(text, loc="left", fontsize=8, pad=3, parse_math=False)
        top -= needed
    figure.legend(
        handles=[Patch(facecolor=color, edgecolor="#888888", label=name) for name, color in _KINDS],
        loc="lower left",
        bbox_to_anchor=(0.25 / _PICTURE_WIDTH - 0.005, 0.0),
        ncols=len(_KINDS),
        frameon=False,
        fontsize=8,
    )
    save_figure(figure, path)
    return figure


def new_figure(size: tuple[float, float]) -> Figure:
    """Returns an empty figure of a size in inches."""
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Writes a figure in the place of what is there; None: nowhere."""
    if path is not None:
        kind = Path(path).suffix.lstrip(".") or "png"
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind)


def _series(history: Sequence[Metrics], name: str) -> np.ndarray:
    values = (number(entry.get(name)) for entry in history)
    return np.array([math.nan if value is None else value for value in values])


def _score_ranges(
    curves: Mapping[str, np.ndarray], spreads: Mapping[str, np.ndarray]
) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """The range of all values, and the one that most of them lie in, if that is much smaller."""
    low = {view: values - spreads.get(view, 0.0) for view, values in curves.items()}
    low = {view: values[np.isfinite(values)] for view, values in low.items()}
    low = {view: values for view, values in low.items() if values.size}
    if not low:
        return (0.0, 1.0), None
    lowest = min(float(values.min()) for values in low.values())
    highest = max(float(np.nanmax(values)) for view, values in curves.items() if view in low)
    # The first value of a curve does not count, nor the worst tenth of the others.
    usual = min(
        float(np.quantile(values[1:] if values.size > 1 else values, 0.1))
        for values in low.values()
    )
    # Curves other than the attackers' are shown from their start if that is not too far below.
    starts = min(
        (float(values.min()) for view, values in low.items() if view in _LINES), default=usual
    )
    if highest - starts < _MOST_WIDENING * (highest - usual):
        usual = min(usual, starts)
    zoomed = _widened(usual, highest) if highest - usual < 0.5 * (highest - lowest) else None
    return _widened(lowest, highest), zoomed


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _line_of(view: str, views: Sequence[str]) -> tuple[str, Any, float]:
    if view in _LINES:
        return _LINES[view]
    index = [each for each in views if each not in _LINES].index(view)
    color = _ATTACKER_COLORS[index % len(_ATTACKER_COLORS)]
    return color, _ATTACKER_DASHES[index % len(_ATTACKER_DASHES)], 1.6


def _draw_curve(
    axes: Axes, rounds: np.ndarray, values: np.ndarray, color: str, dashes: Any, width: float
) -> None:
    # A single point draws no line.
    marker = "o" if len(rounds) == 1 else ""
    axes.plot(rounds, values, color=color, linestyle=dashes, lw=width, marker=marker, ms=4)


def _label_ends(axes: Axes, curves: Mapping[str, np.ndarray], views: Sequence[str]) -> None:
    """Names every curve and its last value to the right of its end, names spread apart."""
    low, high = axes.get_ylim()
    ends = {
        # A last value that is not a number has its name at the bottom.
        view: min(max((np.nan_to_num(values[-1], nan=low) - low) / (high - low), 0.0), 1.0)
        for view, values in curves.items()
    }
    order = sorted(ends, key=lambda view: ends[view])
    wanted = [ends[view] for view in order]
    for view, start, place in zip(order, wanted, _spread(wanted, 0.065), strict=True):
        color, dashes, width = _line_of(view, views)
        axes.plot(
            (1.0, 1.03, 1.08),
            (start, place, place),
            transform=axes.transAxes,
            clip_on=False,
            color=color,
            linestyle=dashes,
            lw=width,
        )
        axes.text(
            1.09,
            place,
            f"{view.replace('_', ' ')}  {_end_text(curves[view][-1])}",
            transform=axes.transAxes,
            va="center",
            fontsize=9,
            parse_math=False,
        )


def _end_text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _spread(places: Sequence[float], distance: float) -> list[float]:
    """Moves ascending places in [0, 1] apart, by as little as is simple."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + distance) if moved else place)
    limit = 1.0
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - distance
    return moved


def _kinds_of(server: Any | None, client: Any | None) -> np.ndarray:
    """int ``[layers, columns]``: indices into `_KINDS`."""
    masks = [np.asarray(mask, bool) for mask in (server, client) if mask is not None]
    everything = np.ones_like(masks[0])
    by_server = everything if server is None else masks[0]
    by_client = everything if client is None else masks[-1]
    return np.where(~by_server, 2, np.where(~by_client, 1, 0))


def _wrap(kinds: np.ndarray, cells: int) -> np.ma.MaskedArray:
    """``[lines, cells]``, every layer cut into lines; masked where a line has no column."""
    layers, columns = kinds.shape
    lines = -(-columns // cells)
    padded = np.ma.masked_all((layers, lines * cells), int)
    padded[:, :columns] = kinds
    return padded.reshape(layers * lines, cells)
