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

_SIZE = (8.4, 6.0)
# Okabe and Ito's palette, which colour-blind readers can tell apart; the shapes do so in grey.
_COLORS = ("#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F")
_MARKERS = ("*", "s", "^", "o", "D", "v", "P", "X")
_NOTHING = Estimate(math.nan, math.nan)


def draw(
    settings: Sequence[Setting], path: str | os.PathLike[str] | None, rival: str = "attacker"
) -> Figure:
    """Draws the global score of every setting against a rival's: up and to the left is better.

    One mark a setting, one colour a method; bars are 95% intervals. The Pareto front, the settings
    that no other surpasses in both, is drawn as a line, and its marks are named. On the dashed
    line a rival has as good a model as its owner.

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
    figure.subplots_adjust(left=0.1, right=0.97, top=0.92, bottom=0.1)
    methods = list(dict.fromkeys(setting.method for setting in settings))
    for index, method in enumerate(methods):
        chosen = [i for i, setting in enumerate(settings) if setting.method == method]
        axes.errorbar(
            [others[i].mean for i in chosen],
            [own[i].mean for i in chosen],
            xerr=[_half(others[i]) for i in chosen],
            yerr=[_half(own[i]) for i in chosen],
            fmt=_MARKERS[index % len(_MARKERS)],
            color=_COLORS[index % len(_COLORS)],
            ms=10 if index == 0 else 6,
            mec="white",
            mew=0.5,
            elinewidth=0.5,
            alpha=0.85,
            label=method,
        )
    front = pareto_front([(other.mean, each.mean) for other, each in zip(others, own, strict=True)])
    if front:
        _draw_front(axes, settings, own, others, front)
    low, high = axes.get_xlim()
    axes.axline((low, low), slope=1, color="#999999", ls=(0, (4, 3)), lw=1, zorder=0)
    axes.set_xlim(low, high)
    axes.set_xlabel(f"{score} of {view.replace('_', ' ')}")
    axes.set_ylabel(f"{score} of global")
    axes.grid(color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
    return figure


def _draw_front(
    axes: Axes,
    settings: Sequence[Setting],
    own: Sequence[Estimate],
    others: Sequence[Estimate],
    front: Sequence[int],
) -> None:
    x, y = [others[i].mean for i in front], [own[i].mean for i in front]
    axes.step(x, y, where="post", color="#444444", lw=1.2, zorder=1, label="Pareto front")
    for index in front:
        numbers = [
            f"{name.rpartition('.')[2]} {value:g}"
            for name, value in settings[index].settings.items()
            if isinstance(value, int | float)
        ]
        axes.annotate(
            ", ".join(numbers),
            (others[index].mean, own[index].mean),
            xytext=(5, -11),
            textcoords="offset points",
            fontsize=7,
        )


def _half(value: Estimate) -> float:
    return 0.0 if math.isnan(value.half) else value.half
