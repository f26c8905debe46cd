"""Plots of distributions and series as PNG files. matplotlib is imported when a plot is drawn."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sarathi.metrics.files import replacing
from sarathi.metrics.tables import cdf

SIZE_INCHES = (6.4, 4.0)
DOTS_PER_INCH = 90
logger = logging.getLogger(__name__)
Points = tuple[Sequence[float], Sequence[float]]


def is_available() -> bool:
    """Whether matplotlib is installed. If it is not, a warning names the package."""
    if find_spec("matplotlib") is None:
        logger.warning("no plots are drawn: matplotlib is not installed (pip install matplotlib)")
        return False
    return True


def plot_cdf(path: Path, name: str, values: Sequence[float]) -> None:
    """The cumulative distribution of values, with median and P99 marked."""
    xs, ys = cdf(values)
    axes = _axes(name, "CDF")
    axes.plot(xs, ys, drawstyle="steps-post")
    for quantile in (0.5, 0.99):
        axes.axhline(quantile, linewidth=0.5, linestyle=":")
    axes.set_ylim(0, 1.02)
    _save(axes, path)


def plot_lines(path: Path, lines: Mapping[str, Points], x_label: str, y_label: str, marker: str = "") -> None:
    """Lines of points (xs, ys) in one plot, with a legend of their names if there are several."""
    axes = _axes(x_label, y_label)
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=name, marker=marker, linewidth=1)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    _save(axes, path)


def plot_bars(path: Path, bars: Mapping[str, float], y_label: str) -> None:
    """One bar for each name."""
    axes = _axes("", y_label)
    axes.bar(list(bars), list(bars.values()))
    axes.tick_params(axis="x", labelrotation=30, labelsize="small")
    _save(axes, path)


def _axes(x_label: str, y_label: str) -> Any:
    """Axes of a new figure that needs no display and is not registered in pyplot."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained").add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return axes


def _save(axes: Any, path: Path) -> None:
    with replacing(path) as part:
        axes.figure.savefig(part, format="png")
