"""Pictures as inline SVG that take their colours from the page: ink is `currentColor`, so light and dark both read well."""

import functools
import io
import re
from collections.abc import Callable
from typing import Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError

INK, FAINT = "#010203", "#040506"
"""Stand-ins for the page's text colour and its colour of rules; no drawing uses them for anything else."""

BLUE, ORANGE, GREEN, PURPLE = "#3b82c4", "#d9822b", "#4c9a5b", "#9467bd"
"""Legible on white and on near-black."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "actcache",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


P = ParamSpec("P")


def drawing(draw: Callable[P, Any]) -> Callable[P, Any]:
    """A function that returns a matplotlib figure, in the page's style.

    Raises:
        UsageError: matplotlib is not installed.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise UsageError("pictures need matplotlib: pip install 'actcache[figures]'") from error
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float = 5.2, height: float = 2.4, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure, in inches, and its axes: one, or an array of several side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, **options)


def to_svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element that fills the width it is given.

    Ids that something in it refers to begin with `name`, so that several pictures share a page; others are gone.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", text)
    for colour, said in ((INK, "currentColor"), (FAINT, "var(--rule, #888)")):
        text = text.replace(colour, said)
    used = set(re.findall(r"[(\"]#([^)\"]+)[)\"]", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"([(\"])#([^)\"]+)([)\"])", rf"\1#{name}-\2\3", text)
    return re.sub(r"\n\s*", "\n", text)


def ramp(colour: str = BLUE) -> Any:
    """A colour map from transparent to `colour`: it reads on any background. NaN is transparent."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    colours = [(*to_rgb(colour), 0.0), (*to_rgb(colour), 1.0)]
    return LinearSegmentedColormap.from_list("ramp", colours).with_extremes(bad=(0, 0, 0, 0))


def average_columns(values: NDArray[Any], most: int = 600) -> NDArray[np.float64]:
    """Columns [rows, c] averaged in groups so that at most `most` are left: more would not be seen."""
    n = values.shape[1]
    if n <= most:
        return np.asarray(values, np.float64)
    edges = np.linspace(0, n, most + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, n))
    return np.add.reduceat(np.asarray(values, np.float64), edges, axis=1) / sizes
