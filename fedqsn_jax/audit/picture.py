"""The picture of an audit: each coalition's attacks between what it reaches alone and the owner."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_OWNER, _ALONE, _BEST, _OTHER, _ASKED = "#000000", "#009E73", "#D55E00", "#E69F00", "#56B4E9"
_BAND = "#F0F0F0"
_DPI = 130


def draw(report: dict[str, Any]) -> bytes:
    """Draws the scores of all attacks with their intervals, a panel for each coalition.

    Args:
      report: What `report.make_report` gives.

    Returns:
      A PNG.
    """
    adversaries = report["adversaries"]
    most = max(len(_shown(each)) for each in adversaries.values())
    figure = Figure(figsize=(4.6 + 3.1 * len(adversaries), 1.9 + 0.27 * most), layout="constrained")
    FigureCanvasAgg(figure)
    played = {one["title"] for each in adversaries.values() for one in _shown(each)}
    everything = next(iter(adversaries.values()))["attacks"]
    titles = [one["title"] for one in everything if one["title"] in played]
    panels = figure.subplots(1, len(adversaries), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, each) in zip(panels, adversaries.items(), strict=True):
        _panel(axes, report, name, each, titles)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].invert_yaxis()
    marks = [
        ("-", _OWNER, "owner's model"),
        ("o", _ALONE, "without the server"),
        ("o", _OTHER, "with proxies"),
        ("o", _ASKED, "with queries"),
        ("D", _BEST, "best attack without queries"),
    ]
    handles = [
        *(
            panels[0].plot([], [], mark, color=color, label=label)[0]
            for mark, color, label in marks
        ),
        Patch(color=_BAND, label="what could be protected"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _shown(each: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in each["attacks"] if "not_played" not in one]


def _panel(
    axes: Axes, report: dict[str, Any], name: str, each: dict[str, Any], titles: list[str]
) -> None:
    owner = report["models"]["global"]["value"]
    axes.axvline(owner, color=_OWNER, linewidth=1.6)
    alone = each["alone"]
    if alone and alone["score"]["value"] < owner:
        axes.axvspan(alone["score"]["value"], owner, color=_BAND, linewidth=0, zorder=0)
    picked = each["best"] and each["best"]["attack"]
    for one in _shown(each):
        place, found = titles.index(one["title"]), one["interval"]
        color = _OTHER
        if one["name"].startswith("alone"):
            color = _ALONE
        elif one["name"].startswith("distilled"):
            color = _ASKED
        mark = "o"
        if one["name"] == picked:
            color, mark = _BEST, "D"
        if found["value"] is None:
            continue
        axes.plot([found["low"], found["high"]], [place, place], color=color, linewidth=1.4)
        axes.plot([found["value"]], [place], mark, color=color, markersize=5)
    count = len(each["members"])
    share = each["protected_share"]["value"]
    title = "one client" if count == 1 else f"{count} colluding clients"
    if each["nothing_to_protect"]:
        title += "\nnothing to protect"
    elif share is not None:
        title += f"\nprotected: {100 * share:.0f}%" if share >= 0.005 else "\nprotected: nothing"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(report["score"])
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
