"""Pictures of rows: times over contexts, ratios as bars, counts, each step's latency. Knows rows and numbers only."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sarathi.benchmark.records import Record

COLUMNS = 3
SHOWN_RATIOS = (0.6, 1.4)  # what lies outside is cut at the border, and told by its number


def draw_times(rows: Sequence[Record], path: Path) -> None:
    """Time over that of the fastest, against context, a panel for each model, work and batch; nothing if none is."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        is_time_of_attention = row.work.startswith(("prefill", "decode")) and row.context
        if is_time_of_attention and not row.work.endswith(("step", "same binary")):
            batch = f", batch {row.batch}" if row.work == "decode" else ""
            panels[f"{row.model}: {row.work}{batch}"][row.backend].append((row.context, row.value))
    wide = {name: lines for name, lines in panels.items() if max(map(len, lines.values())) > 1}
    if not wide:
        return
    figure, axes = _panels(len(wide), height=3, columns=COLUMNS)
    names = dict.fromkeys(backend for lines in wide.values() for backend in lines)
    colors = dict(zip(names, _colors(len(names)), strict=True))
    for (name, lines), axis in zip(wide.items(), axes, strict=False):
        fastest = _fastest(lines)
        for backend, points in lines.items():
            over = sorted((context, value / fastest[context]) for context, value in points)
            axis.plot(*zip(*over, strict=True), marker="o", markersize=3, color=colors[backend])
        axis.set(title=name, xscale="log", xlabel="tokens of context", ylabel="time / fastest", ylim=(0.97, 1.6))
    handles = [axes[0].plot([], [], marker="o", color=color, label=name)[0] for name, color in colors.items()]
    figure.legend(handles=handles, loc="lower center", ncols=COLUMNS, fontsize=8)
    _save(figure, path, legend_rows=-(-len(colors) // COLUMNS))


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab20"](index % 20) for index in range(count)]


def _fastest(lines: Mapping[str, Sequence[tuple[int, float]]]) -> dict[int, float]:
    """Context -> the least value."""
    fastest: dict[int, float] = {}
    for context, value in (point for points in lines.values() for point in points):
        fastest[context] = min(value, fastest.get(context, value))
    return fastest


def draw_ratios(records: Sequence[Record], path: Path) -> None:
    """A bar from 1 for each record that is compared, to the right where ours is better; nothing if none is compared."""
    ratios = {_comparison(record): record.ratio for record in records if record.ratio is not None}
    if not ratios:
        return
    figure, (axis,) = _panels(1, height=1 + 0.25 * len(ratios))
    low, high = SHOWN_RATIOS
    ends = [min(max(ratio, low), high) for ratio in ratios.values()]
    colors = ["tab:blue" if end >= 1 else "tab:red" for end in ends]
    bars = axis.barh(range(len(ends)), [end - 1 for end in ends], left=1, color=colors)
    axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios.values()], fontsize=6, padding=2)
    axis.set_yticks(range(len(ends)), list(ratios), fontsize=6)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set(xlabel="ratio, above 1: ours is better", xlim=SHOWN_RATIOS, ylim=(len(ends), -1))
    _save(figure, path)


def _comparison(record: Record) -> str:
    shape = f"{record.model}, {record.work}, {record.batch} x {record.context}"
    return f"{shape}: {record.backend} / {record.reference}"


def draw_bars(panels: Mapping[str, Mapping[str, float]], path: Path, label: str, columns: int) -> None:
    """A panel for each name, on a scale of its own from zero; in it a bar with its number for each of its names."""
    figure, axes = _panels(len(panels), height=2.5, columns=columns)
    for (name, heights), axis in zip(panels.items(), axes, strict=False):
        bars = axis.bar(list(heights), list(heights.values()), color=_colors(len(heights)))
        axis.bar_label(bars, fontsize=8, padding=1)
        axis.set(title=name, ylabel=label)
        axis.margins(y=0.15)
    _save(figure, path)


def draw_steps(steps_ms: Mapping[str, Sequence[float]], path: Path) -> None:
    """The latency of every step, a panel a run, on one scale so that spikes can be compared."""
    if not steps_ms:
        return
    figure, axes = _panels(len(steps_ms), height=2.5)
    top = 1.05 * max(max(steps) for steps in steps_ms.values())
    for (name, steps), axis in zip(steps_ms.items(), axes, strict=True):
        axis.plot(range(len(steps)), steps, ".", markersize=2)
        axis.set(title=name, ylim=(0, top), xlabel="step", ylabel="ms")
    _save(figure, path)


def _panels(count: int, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(9 if columns == 1 else 5 * columns, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes


def _save(figure: Any, path: Path, legend_rows: int = 0) -> None:
    """legend_rows: lines of a legend below all panels."""
    figure.tight_layout(rect=(0, 0.25 * legend_rows / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=100)
    print(f"# drew {path}", flush=True)
