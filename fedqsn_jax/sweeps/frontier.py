"""The picture of an audited sweep: what a setting keeps for its owner against what it protects.

Importing this takes a third of a second, for Matplotlib; import it where a picture is made.
"""

import math
import os
from collections.abc import Sequence

from fedqsn_jax.reporting.matplotlib_parts import Axes, Figure, Line2D
from fedqsn_jax.reporting.plots import new_figure, save_figure
from fedqsn_jax.sweeps.audits import BENEFIT, SHARE, coalitions, mechanism
from fedqsn_jax.sweeps.estimates import Estimate, Setting, pareto_front, short_names
from fedqsn_jax.sweeps.trade_off import look

_PANEL_INCHES, _COLUMN_INCHES, _LINE_INCHES = 4.2, 3.6, 0.19
_LOWEST_INCHES, _TOP_INCHES, _BOTTOM_INCHES, _LEFT_INCHES = 4.6, 0.8, 0.6, 0.8
_GAP_INCHES = 0.25
_NOTHING = Estimate(math.nan, math.nan)


def draw(
    settings: Sequence[Setting], path: str | os.PathLike[str] | None, title: str = ""
) -> Figure:
    """Draws the kept benefit U against the protected share P, a panel a coalition.

    One mark a setting, numbered and named at the side, one colour a mechanism; pale bars are 95%
    intervals, and may go beyond the axes. Up and to the right is better. The Pareto front, the
    settings that no other surpasses in both, is drawn as a line. Settings of which U or P is
    unknown are not drawn; where that is all of them, there is nothing to protect.

    Args:
      settings: What `audits.with_shares` gives.
      path: Where to write it, in the place of what is there; None: nowhere.
      title: What was run: data and rounds.

    Returns:
      The figure.
    """
    who = coalitions(settings)
    mechanisms = list(dict.fromkeys(mechanism(each.settings) for each in settings))
    lines = len(mechanisms) + len(settings) + 6
    width = _LEFT_INCHES + len(who) * (_PANEL_INCHES + _GAP_INCHES) + _COLUMN_INCHES
    height = max(_LOWEST_INCHES, _LINE_INCHES * lines + _TOP_INCHES)
    figure = new_figure((width, height))
    bottom, tall = _BOTTOM_INCHES / height, 1 - (_TOP_INCHES + _BOTTOM_INCHES) / height
    first: Axes | None = None
    for index, name in enumerate(who):
        left = _LEFT_INCHES + index * (_PANEL_INCHES + _GAP_INCHES)
        axes = figure.add_axes(
            (left / width, bottom, _PANEL_INCHES / width, tall), sharex=first, sharey=first
        )
        _panel(axes, settings, mechanisms, name)
        axes.tick_params(labelleft=first is None)
        first = first or axes
    if first is not None:
        first.set_ylabel("protected share P")
        _fit(first, settings, who)
    heading = "\n".join([*filter(None, [title]), "up and to the right is better"])
    figure.text(_LEFT_INCHES / width, 1 - 0.1 / height, heading, va="top", parse_math=False)
    side = 1 - (_COLUMN_INCHES - 0.05) / width
    _legend(figure, mechanisms, (side, bottom + tall))
    names = [f"{number:>2}  {_name(each)}" for number, each in enumerate(settings, 1)]
    below = bottom + tall - _LINE_INCHES * (len(mechanisms) + 3.5) / height
    figure.text(side, below, "\n".join(names), va="top", fontsize=8, parse_math=False)
    save_figure(figure, path)
    return figure


def _panel(axes: Axes, settings: Sequence[Setting], mechanisms: Sequence[str], name: str) -> None:
    pairs = [_pair(each, name) for each in settings]
    for number, (each, (benefit, share)) in enumerate(zip(settings, pairs, strict=True), 1):
        if math.isnan(benefit.mean) or math.isnan(share.mean):
            continue
        kind = mechanisms.index(mechanism(each.settings))
        color, marker = look(kind)
        high, wide = (0.0 if math.isnan(each.half) else each.half for each in (share, benefit))
        axes.errorbar(
            benefit.mean,
            share.mean,
            high,
            wide,
            fmt="none",
            ecolor=color,
            elinewidth=0.6,
            alpha=0.3,
        )
        size = 11 if marker == "*" else 6
        axes.plot(benefit.mean, share.mean, marker, color=color, ms=size, mec="white", mew=0.5)
        axes.annotate(
            str(number),
            (benefit.mean, share.mean),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
        )
    front = pareto_front([(-share.mean, benefit.mean) for benefit, share in pairs])
    x, y = [pairs[i][0].mean for i in front], [pairs[i][1].mean for i in front]
    axes.step(x, y, where="pre", color="#444444", lw=1.2, zorder=0)
    axes.axhline(0, color="#777777", lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.grid(color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("kept benefit U")
    heading = "half of the clients collude" if name == "half" else f"{name} colluding"
    heading = "one client" if name == "1" else heading
    if not front:
        heading += ": nothing to protect"
    axes.set_title(heading, fontsize=10)


def _pair(setting: Setting, name: str) -> tuple[Estimate, Estimate]:
    metrics = setting.metrics
    return metrics.get(BENEFIT, _NOTHING), metrics.get(f"{SHARE}{name}", _NOTHING)


def _fit(axes: Axes, settings: Sequence[Setting], who: Sequence[str]) -> None:
    """Sets the axes' ranges by the marks; intervals of few seeds would be far wider."""
    pairs = [_pair(each, name) for each in settings for name in who]
    drawn = [(u.mean, p.mean) for u, p in pairs if not math.isnan(u.mean + p.mean)]
    axes.set_xlim(_range([benefit for benefit, _ in drawn]))
    axes.set_ylim(_range([share for _, share in drawn]))


def _range(values: Sequence[float]) -> tuple[float, float]:
    # 0 and 1 are what the figures are read against.
    low, high = min([0.0, *values]), max([1.0, *values])
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _legend(figure: Figure, mechanisms: Sequence[str], corner: tuple[float, float]) -> None:
    handles = []
    for kind, name in enumerate(mechanisms):
        color, marker = look(kind)
        handles.append(Line2D([], [], color=color, marker=marker, ls="", label=name))
    handles.append(Line2D([], [], color="#444444", lw=1.2, label="Pareto front"))
    bar = Line2D([], [], color="#000000", lw=0.6, alpha=0.5, marker="|", ms=5)
    bar.set_label("95% interval over seeds")
    handles.append(bar)
    legend = figure.legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        loc="upper left",
        bbox_to_anchor=corner,
        borderaxespad=0,
        borderpad=0,
    )
    for entry in legend.get_texts():
        entry.set_parse_math(False)


def _name(setting: Setting) -> str:
    names = short_names(setting.settings)
    numbers = [
        f"{names[field]} {value}"
        for field, value in setting.settings.items()
        if value is not None and not isinstance(value, str) and not field.startswith("broadcast.")
    ]
    return ", ".join([mechanism(setting.settings), *numbers])
