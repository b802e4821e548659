"""Pictures of a sweep: what a setting gives to its owner against what it gives to others.

Importing this takes a third of a second, for Matplotlib; import it where a picture is made.
"""

import math
import os
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedqsn_jax.reporting.estimates import Estimate, Setting, pareto_front, rival_view, score_of
from fedqsn_jax.reporting.plots import new_figure, save_figure

_SIZE = (9.6, 6.0)
_MARGIN = 0.06
_MOST_NAMED = 26
# Okabe and Ito's palette, which colour-blind readers can tell apart; the shapes do so in grey.
_COLORS = ("#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F")
_MARKERS = ("*", "s", "^", "o", "D", "v", "P", "X")
_NOTHING = Estimate(math.nan, math.nan)


def draw(
    settings: Sequence[Setting], path: str | os.PathLike[str] | None, rival: str = "attacker"
) -> Figure:
    """Draws the global score of every setting against a rival's: up and to the left is better.

    One mark a setting, one colour a method; pale bars are 95% intervals, and may go beyond the
    axes. The Pareto front, the settings that no other surpasses in both, is drawn as a line; its
    marks are numbered and named at the side. On the dashed line a rival has as good a model as the
    owner.

    Args:
      settings: What was measured.
      path: Where to write it, in the place of what is there; None: nowhere.
      rival: ``attacker`` (the largest number of colluders) or ``proxy``.

    Returns:
      The figure.
    """
    score, view = score_of(settings), rival_view(settings, rival)
    own, others = (
        [setting.metrics.get(f"{each}/{score}", _NOTHING) for setting in settings]
        for each in ("global", view)
    )
    figure = new_figure(_SIZE)
    axes = figure.subplots()
    # Room for the names on the right; a fixed layout keeps the picture's size exact.
    figure.subplots_adjust(left=0.08, right=0.71, top=0.93, bottom=0.09)
    methods = list(dict.fromkeys(setting.method for setting in settings))
    for index, method in enumerate(methods):
        chosen = [i for i, setting in enumerate(settings) if setting.method == method]
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        x, y = [others[i].mean for i in chosen], [own[i].mean for i in chosen]
        half_x, half_y = ([_half(values[i]) for i in chosen] for values in (others, own))
        axes.errorbar(x, y, half_y, half_x, fmt="none", ecolor=color, elinewidth=0.6, alpha=0.25)
        axes.plot(
            x,
            y,
            marker,
            color=color,
            ms=11 if marker == "*" else 6,
            mec="white",
            mew=0.5,
            label=method,
            zorder=3,
        )
    _fit(axes, others, own)
    front = pareto_front([(other.mean, each.mean) for other, each in zip(others, own, strict=True)])
    if front:
        _draw_front(axes, settings, own, others, front)
    axes.axline((1, 1), slope=1, color="#999999", ls=(0, (4, 3)), lw=1, zorder=0)
    axes.set_xlabel(f"{score} of {view.replace('_', ' ')}")
    axes.set_ylabel(f"{score} of global")
    axes.set_title("up and to the left is better", loc="left", fontsize=10)
    axes.grid(color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    save_figure(figure, path)
    return figure


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
) -> None:
    x, y = [others[i].mean for i in front], [own[i].mean for i in front]
    axes.step(x, y, where="post", color="#444444", lw=1.2, zorder=2, label="Pareto front")
    names = []
    for number, index in enumerate(front, 1):
        # Above and to the left of a mark of the front there is no other.
        axes.annotate(
            str(number),
            (others[index].mean, own[index].mean),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        names.append(f"{number:>2}  {_name(settings[index])}")
    if len(names) > _MOST_NAMED:
        names = [*names[: _MOST_NAMED - 1], f"and {len(names) - _MOST_NAMED + 1} more"]
    text = "\n".join(["On the front:", *names])
    axes.text(1.03, 0.72, text, transform=axes.transAxes, va="top", fontsize=8, parse_math=False)


def _name(setting: Setting) -> str:
    numbers = (
        f"{field.rpartition('.')[2].replace('_', ' ')} {value}"
        for field, value in setting.settings.items()
        if value is not None and not isinstance(value, str)
    )
    return ", ".join([setting.method, *numbers])


def _half(value: Estimate) -> float:
    return 0.0 if math.isnan(value.half) else value.half
