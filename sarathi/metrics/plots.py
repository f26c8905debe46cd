"""Matplotlib figures: panels with a caption, lines, bars and percentile plots. matplotlib is imported on first use."""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from sarathi.metrics.files import replacing

OURS, LIGHT, OTHERS, AGAINST = "tab:blue", "lightsteelblue", "0.7", "tab:orange"
DOTS_PER_INCH = 100
_SMALL = 8  # points
logger = logging.getLogger(__name__)
Points = tuple[Sequence[float], Sequence[float]]


def is_available() -> bool:
    """Whether matplotlib is installed. Logs a warning if it is not."""
    if find_spec("matplotlib") is None:
        logger.warning("no figures are drawn: matplotlib is not installed (pip install 'sarathi-vattention[bench]')")
        return False
    return True


class Panels:
    """A figure with a grid of axes. Needs no display and no pyplot state.

    width: of a column, in inches. heights: of each row, in inches.
    """

    def __init__(self, columns: int = 1, width: float = 6.4, heights: Sequence[float] = (3.6,)) -> None:
        from matplotlib.figure import Figure

        size = (width * columns, sum(heights))
        self.figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        grid = self.figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
        self.axes = list(grid.flatten())

    def save(self, path: Path, caption: str = "") -> None:
        """Write a PNG; replaces an existing file."""
        with replacing(path) as part:
            part.write_bytes(self._png(caption))

    def data_uri(self, caption: str = "") -> str:
        """The PNG as a data URI for <img src>."""
        return f"data:image/png;base64,{base64.b64encode(self._png(caption)).decode()}"

    def legend(self, axis: Any) -> None:
        """A legend of one axis's lines, above all panels."""
        self.figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=_SMALL)

    def _png(self, caption: str) -> bytes:
        for axis in self.axes:
            axis.set_visible(axis.has_data())
        self.figure.supxlabel(caption, x=0.01, ha="left", fontsize=7, color="0.4")
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_lines(
    path: Path, lines: Mapping[str, Points], x_label: str, y_label: str, marker: str = "", caption: str = ""
) -> None:
    """Lines of points (xs, ys) on one axis, with a legend if there are several."""
    panels = Panels()
    draw_lines(panels.axes[0], lines, x_label, y_label, marker)
    panels.save(path, caption)


def plot_tails(path: Path, samples: Mapping[str, Sequence[float]], label: str, caption: str = "") -> None:
    """Distributions on one axis: see draw_tails."""
    panels = Panels()
    draw_tails(panels.axes[0], samples, label)
    panels.save(path, caption)


def draw_lines(axis: Any, lines: Mapping[str, Points], x_label: str, y_label: str, marker: str = "") -> None:
    """Lines of points (xs, ys), with a legend if there are several."""
    for name, (xs, ys) in lines.items():
        axis.plot(xs, ys, label=name, marker=marker, linewidth=1.2)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=_SMALL)


def draw_tails(axis: Any, samples: Mapping[str, Sequence[float]], label: str, colors: Sequence[str] = ()) -> None:
    """Complementary CDFs on a logarithmic axis, labelled by percentile."""
    for (name, values), color in zip_longest(samples.items(), colors[: len(samples)]):
        ordered = np.sort(np.asarray(values, dtype=float))
        at_least = 1 - np.arange(len(ordered)) / max(len(ordered), 1)  # fraction of the values >= this one
        axis.plot(ordered, at_least, label=name, color=color, drawstyle="steps-post", linewidth=1.2)
    shares = {0.5: "P50", 0.1: "P90", 0.01: "P99", 0.001: "P99.9", 0.0001: "P99.99"}
    lowest = 1 / max((len(values) for values in samples.values()), default=1)
    shown = {share: name for share, name in shares.items() if share >= lowest} or {0.5: "P50"}
    axis.set(xlabel=label, ylabel="percentile", yscale="log", ylim=(1, lowest * 0.8))
    axis.set_yticks(list(shown), list(shown.values()))
    axis.set_yticks([], minor=True)
    axis.grid(alpha=0.3)
    if len(samples) > 1:
        axis.legend(fontsize=_SMALL)


def draw_bars(axis: Any, heights: Mapping[str, float], label: str, bold: Sequence[str] = ()) -> None:
    """Horizontal bars labelled with their values. bold: names in colour; empty: all."""
    colors = [OURS if name in bold or not bold else OTHERS for name in heights]
    bars = axis.barh(range(len(heights)), list(heights.values()), color=colors)
    axis.bar_label(bars, [f"{value:.4g}" for value in heights.values()], fontsize=_SMALL, padding=2)
    axis.set_yticks(range(len(heights)), list(heights), fontsize=_SMALL)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(label, fontsize=_SMALL)


def draw_ratios(axis: Any, ratios: Mapping[str, float], label: str, shown: tuple[float, float] = (0.6, 1.4)) -> None:
    """Horizontal bars from 1 to each ratio, labelled. A bar clipped at the axis limits has a gap near its end."""
    low, high = shown
    lengths = [min(max(ratio, low), high) - 1 for ratio in ratios.values()]
    colors = [OURS if ratio >= 1 else AGAINST for ratio in ratios.values()]
    bars = axis.barh(range(len(lengths)), lengths, left=1, color=colors)
    axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios.values()], fontsize=_SMALL, padding=2)
    axis.set_yticks(range(len(lengths)), list(ratios), fontsize=_SMALL)
    for number, ratio in enumerate(ratios.values()):
        if not low <= ratio <= high:
            end = high - 0.05 if ratio > high else low + 0.05
            axis.plot([end - 0.008, end + 0.008], [number - 0.45, number + 0.45], color="white", linewidth=2.5)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.set_xlim(low - 0.1, high + 0.1)
    axis.set_xlabel(label, fontsize=_SMALL)
