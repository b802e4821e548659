"""Pictures of a sweep: what a setting gives to its owner against what it gives to others.

Importing this takes a third of a second, for Matplotlib; import it where a picture is made.
"""

import itertools
import math
import os
import re
from collections.abc import Sequence

from fedqsn_jax.reporting.matplotlib_parts import Axes, Figure, Line2D, MaxNLocator, Rectangle
from fedqsn_jax.reporting.plots import new_figure, save_figure
from fedqsn_jax.sweeps.estimates import (
    Estimate,
    Setting,
    pareto_front,
    rival_view,
    score_of,
    short_names,
)

_SIZE = (9.6, 7.2)
_AXES = (0.09, 0.09, 0.6, 0.81)
_OVERVIEW = (0.76, 0.09, 0.22, 0.31)
# What is to be read stands right of the axes, from here on; it is so wide, or, where a name would
# take more than two lines, twice as wide, and the picture with it.
_COLUMN = 0.705
_COLUMN_INCHES, _WIDE_INCHES = 2.7, 5.4
_ABOVE_OVERVIEW = 0.44
_GAP_INCHES = 0.15
_LOWEST_INCHES = 4.8
_NAME_POINTS, _LEGEND_POINTS = 8, 9
_HANDLE_INCHES = 0.5
_INDENT = 5 * " "
_MARGIN = 0.06
_MOST_NAMED = 22
# Okabe and Ito's palette, which colour-blind readers can tell apart; the shapes do so in grey.
_COLORS = ("#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F")
_MARKERS = ("*", "s", "^", "o", "D", "v", "P", "X")
_DASHED_COLOR, _DASHES = "#777777", (0, (4, 3))
_NOTHING = Estimate(math.nan, math.nan)


def draw(
    settings: Sequence[Setting],
    path: str | os.PathLike[str] | None,
    rival: str = "attacker",
    title: str = "",
) -> Figure:
    """Draws the global score of every setting against a rival's: up and to the left is better.

    One mark a setting, one colour a method; pale bars are 95% intervals, and may go beyond the
    axes. The Pareto front, the settings that no other surpasses in both, is drawn as a line; its
    marks are numbered and named at the side. On the dashed line a rival has as good a model as the
    owner. Where settings end below what the owner had before the first round, a small picture shows
    them all, and the large one those that are worth a look. The picture is as large as its names
    need.

    Args:
      settings: What was measured.
      path: Where to write it, in the place of what is there; None: nowhere.
      rival: ``attacker`` (the largest number of colluders) or ``proxy``.
      title: What was run: data and rounds.

    Returns:
      The figure.
    """
    score, view = score_of(settings), rival_view(settings, rival)
    own, others = (
        [setting.metrics.get(f"{each}/{score}", _NOTHING) for setting in settings]
        for each in ("global", view)
    )
    figure = new_figure(_SIZE)
    axes = figure.add_axes(_AXES)
    start = max(setting.metrics[f"start/{score}"].mean for setting in settings)
    numbers = [index for index, each in enumerate(own) if not math.isnan(each.mean)]
    main = [index for index in numbers if own[index].mean >= start] or numbers
    overview = figure.add_axes(_OVERVIEW) if len(main) < len(numbers) else None
    _draw_marks(axes, settings, own, others, 6)
    _fit(axes, [others[index] for index in main], [own[index] for index in main])
    if overview is not None:
        _draw_marks(overview, settings, own, others, 3)
        _fit(overview, others, own)
        overview.tick_params(labelsize=7)
        for axis in (overview.xaxis, overview.yaxis):
            axis.set_major_locator(MaxNLocator(3))
        overview.set_title("all settings", loc="left", fontsize=8)
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        overview.add_patch(Rectangle((left, low), right - left, high - low, fc="none", ec="black"))
    front = pareto_front([(other.mean, each.mean) for other, each in zip(others, own, strict=True)])
    names = _draw_front(axes, settings, own, others, front, set(main))
    for each in figure.axes:
        each.axline((1, 1), slope=1, color=_DASHED_COLOR, ls=_DASHES, lw=1, zorder=0)
        each.grid(color="#E5E5E5", lw=0.6)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"{score} of {view.replace('_', ' ')}")
    axes.set_ylabel(f"{score} of global")
    lines = [*filter(None, [title]), "up and to the left is better"]
    axes.set_title("\n".join(lines), loc="left", fontsize=10, parse_math=False)
    intervals = any(not math.isnan(each.half) for each in (*own, *others))
    _write_column(figure, axes, names, None if overview is None else _ABOVE_OVERVIEW, intervals)
    save_figure(figure, path)
    return figure


def _draw_marks(
    axes: Axes,
    settings: Sequence[Setting],
    own: Sequence[Estimate],
    others: Sequence[Estimate],
    size: float,
) -> None:
    methods = list(dict.fromkeys(setting.method for setting in settings))
    for index, method in enumerate(methods):
        chosen = [i for i, setting in enumerate(settings) if setting.method == method]
        color, marker = look(index)
        x, y = [others[i].mean for i in chosen], [own[i].mean for i in chosen]
        half_x, half_y = ([_half(values[i]) for i in chosen] for values in (others, own))
        # Below every mark, the line of the front and the numbers.
        axes.errorbar(
            x, y, half_y, half_x, fmt="none", ecolor=color, elinewidth=0.6, alpha=0.3, zorder=1
        )
        axes.plot(
            x,
            y,
            marker,
            color=color,
            ms=2 * size if marker == "*" else size,
            mec="white",
            mew=0.5,
            label=method,
            zorder=4 if marker == "*" else 3,
        )


def look(index: int) -> tuple[str, str]:
    """The colour and the shape of the marks of one kind of setting, by its place among them."""
    # Beyond the last colour they begin again, each with another shape.
    shape = index + index // len(_COLORS)
    return _COLORS[index % len(_COLORS)], _MARKERS[shape % len(_MARKERS)]


def _fit(axes: Axes, others: Sequence[Estimate], own: Sequence[Estimate]) -> None:
    """Sets the axes' ranges by the marks; intervals of few seeds would be far wider."""
    for estimates, set_range in ((others, axes.set_xlim), (own, axes.set_ylim)):
        means = [each.mean for each in estimates if not math.isnan(each.mean)] or [0.0, 1.0]
        margin = _MARGIN * (max(means) - min(means)) or 0.05
        set_range(min(means) - margin, max(means) + margin)


def _draw_front(
    axes: Axes,
    settings: Sequence[Setting],
    own: Sequence[Estimate],
    others: Sequence[Estimate],
    front: Sequence[int],
    named: set[int],
) -> list[str]:
    """Draws the line through the front, and numbers those of its marks in ``named``.

    Returns:
      Their names, with their numbers.
    """
    x, y = [others[i].mean for i in front], [own[i].mean for i in front]
    axes.step(x, y, where="post", color="#444444", lw=1.2, zorder=2, label="Pareto front")
    names = []
    for number, index in enumerate((index for index in front if index in named), 1):
        # Above and to the left of a mark of the front there is no other.
        axes.annotate(
            str(number),
            (others[index].mean, own[index].mean),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            zorder=5,
        )
        names.append(f"{number:>2}  {_name(settings[index])}")
    if len(names) > _MOST_NAMED:
        names = [*names[: _MOST_NAMED - 1], f"and {len(names) - _MOST_NAMED + 1} more"]
    return names


def _legend_handles(axes: Axes, intervals: bool) -> list[Line2D]:
    """What each colour, line and bar stands for, of those that the axes show."""
    handles = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    lowest = max(axes.get_xlim()[0], axes.get_ylim()[0])
    if lowest <= min(axes.get_xlim()[1], axes.get_ylim()[1]):
        label = "as good as the owner's model"
        handles.append(Line2D([], [], color=_DASHED_COLOR, ls=_DASHES, lw=1, label=label))
    if intervals:
        bar = Line2D([], [], color="#000000", lw=0.6, alpha=0.5, marker="|", ms=5)
        bar.set_label("95% interval over seeds")
        handles.append(bar)
    return handles


def _write_column(
    figure: Figure, axes: Axes, names: Sequence[str], bottom: float | None, intervals: bool
) -> None:
    """Writes the legend and the names beside the axes, and makes the figure large enough for both.

    Args:
      figure: The figure.
      axes: The axes that have the marks.
      names: What the marks of the front are.
      bottom: The height, as a share of the figure's, that the names must not go below; None where
        there is nothing else beside the axes, so that the figure is no larger than they need.
      intervals: Whether intervals are drawn.
    """

    def broken(inches: float) -> list[list[str]]:
        return [_wrapped(figure, name, _NAME_POINTS, inches, _INDENT) for name in names]

    width, lines = _COLUMN_INCHES, broken(_COLUMN_INCHES)
    if any(len(each) > 2 for each in lines):
        width, lines = _WIDE_INCHES, broken(_WIDE_INCHES)
    wide = _SIZE[0] + width - _COLUMN_INCHES
    left, top = _COLUMN * _SIZE[0] / wide, _AXES[1] + _AXES[3]
    legend = axes.legend(
        handles=_legend_handles(axes, intervals),
        frameon=False,
        fontsize=_LEGEND_POINTS,
        loc="upper left",
        bbox_to_anchor=(left, top),
        bbox_transform=figure.transFigure,
        borderaxespad=0,
        borderpad=0,
    )
    for entry in legend.get_texts():
        own = _wrapped(figure, entry.get_text(), _LEGEND_POINTS, width - _HANDLE_INCHES)
        entry.set(text="\n".join(own), parse_math=False)
    text = figure.text(
        left,
        0,
        "\n".join(["on the front:", *itertools.chain(*lines)]),
        va="top",
        fontsize=_NAME_POINTS,
        parse_math=False,
    )
    extents = [each.get_window_extent() for each in (legend, text)]
    heights = [each.height / figure.dpi for each in extents]
    needed = sum(heights) + 2 * _GAP_INCHES
    if bottom is None:
        wide += max(each.width for each in extents) / figure.dpi - width
        tall = max(_LOWEST_INCHES, needed / _AXES[3])
    else:
        tall = max(_SIZE[1], needed / (top - bottom))
    for each in figure.axes:
        x, y, x_size, y_size = each.get_position().bounds
        each.set_position((x * _SIZE[0] / wide, y, x_size * _SIZE[0] / wide, y_size))
    figure.set_size_inches(wide, tall)
    left = _COLUMN * _SIZE[0] / wide
    legend.set_bbox_to_anchor((left, top), transform=figure.transFigure)
    text.set_position((left, top - (heights[0] + _GAP_INCHES) / tall))


def _wrapped(
    figure: Figure, text: str, points: float, inches: float, indent: str = ""
) -> list[str]:
    """Breaks a text into lines of a width, after its commas, and within what is longer than that.

    Args:
      figure: The figure, which knows how wide letters are.
      text: The text.
      points: The size of the letters.
      inches: The width.
      indent: What the second and later lines begin with.
    """

    def fits(line: str) -> bool:
        probe.set_text(line)
        return probe.get_window_extent().width <= inches * figure.dpi

    probe = figure.text(0, 0, "", fontsize=points, parse_math=False)
    lines = [""]
    for piece in re.findall(r"[^,]*,? ?", text):
        if lines[-1].strip() and not fits(lines[-1] + piece.rstrip()):
            lines.append(indent)
        lines[-1] += piece
        while not fits(lines[-1].rstrip()):
            line = lines.pop()
            most = next(n for n in range(len(line) - 1, 0, -1) if fits(line[:n]))
            lines += [line[:most], indent + line[most:]]
    probe.remove()
    return [line.rstrip() for line in lines]


def _name(setting: Setting) -> str:
    names = short_names(setting.settings)
    numbers = (
        f"{re.sub('[._]', ' ', names[field])} {value}"
        for field, value in setting.settings.items()
        if value is not None and not isinstance(value, str)
    )
    # Where nothing but numbers differs, the method's name would say nothing.
    named = any(isinstance(value, str) for value in setting.settings.values())
    return ", ".join([*([setting.method] if named else []), *numbers]) or setting.method


def _half(value: Estimate) -> float:
    return 0.0 if math.isnan(value.half) else value.half
