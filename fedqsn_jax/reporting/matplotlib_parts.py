"""The parts of Matplotlib that pictures are made of; none depends on a display.

Importing this takes a third of a second. Matplotlib reads ``MPLBACKEND`` when it is imported, and
refuses a name that is not there, such as Jupyter's ``inline`` in another environment; here that
makes no difference, as no backend is used but Agg's canvas.
"""

import os
import sys

try:
    import matplotlib
except ValueError:
    # What the failed import left behind is of no use to the next one.
    for _name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[_name]
    _named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if _named is not None:
            os.environ["MPLBACKEND"] = _named

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

__all__ = [
    "Axes",
    "Figure",
    "FigureCanvasAgg",
    "Line2D",
    "ListedColormap",
    "MaxNLocator",
    "Patch",
    "Rectangle",
    "matplotlib",
]
