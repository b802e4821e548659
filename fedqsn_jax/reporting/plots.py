"""Pictures: the curves of all views, and the columns that one client sees."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedqsn_jax.reporting.summary import views_of
Entry=dict

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
_STYLES = {"global": "-", "server": "--", "proxy": "-"}


def accuracy_curves(history: list[Entry], path, title: str, score: str = "accuracy") -> Figure:
    """Draws the score of every view over the rounds, the proxy's with its spread.

    Args:
      history: One entry an evaluated round.
      title: What was run.
      score: The metric.
    """
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rounds = np.array([entry["round"] for entry in history])
    lowest = 1.0
    for view, color in zip(views_of(history[0]), _COLORS * len(history[0]), strict=False):
        values = np.array([entry[f"{view}/{score}"] for entry in history], float)
        label = f"{view.replace('_', ' ')}  {values[-1]:.3f}"
        axes.plot(rounds, values, _STYLES.get(view, ":"), color=color, label=label, lw=1.8)
        spread = f"{view}/{score}_std"
        if spread in history[0]:
            std = np.array([entry[spread] for entry in history], float)
            axes.fill_between(rounds, values - std, values + std, color=color, alpha=0.15, lw=0)
        # Attackers start from nothing; their first values must not flatten everything else.
        lowest = min(lowest, values.min() if view == "global" else np.quantile(values, 0.1))
    highest = max(entry[f"{view}/{score}"] for entry in history for view in views_of(history[0]))
    margin = 0.08 * max(highest - lowest, 0.02)
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set(xlabel="round", ylabel=score, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside right center", frameon=False, title=f"view, {score} at the end", fontsize=9
    )
    save(figure, path)


def column_picture(
    server_visible: Mapping[str, Any], client_visible: Mapping[str, Any], title: str = ""
) -> Figure:
    """Draws which columns of each site one client sees.

    Args:
      server_visible: bool ``[layers, columns]`` a site: the columns that any client may see.
      client_visible: The same for this client in this round.
      title: What is shown.
    """
    figure = Figure(figsize=(8, 0.9 + 0.7 * len(server_visible)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    names = ("visible", "hidden from this client in this round", "hidden by the server for good")
    colors = ("#009E73", "#E69F00", "#000000")
    all_axes = figure.subplots(len(server_visible), 1, squeeze=False)[:, 0]
    for axes, (path, server) in zip(all_axes, server_visible.items(), strict=True):
        server_mask, client_mask = np.asarray(server), np.asarray(client_visible[path])
        kinds = np.where(~server_mask, 2, np.where(~client_mask, 1, 0))
        axes.imshow(
            kinds, aspect="auto", cmap=ListedColormap(colors), vmin=0, vmax=2, interpolation="none"
        )
        axes.set_yticks([])
        axes.set_title(f"{path}: {kinds.shape[1]} columns", fontsize=9, loc="left")
    figure.legend(
        handles=[Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(title)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, all or nothing."""
    temporary = path.with_name(f".{path.name}.new")
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(temporary, format="png")
    temporary.replace(path)
