"""Pictures of rows: times over contexts, ratios as bars, the latency of every step. Knows rows and numbers only."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measurement.table import Row


def draw_times(rows: Sequence[Row], path: Path) -> None:
    """Time against context, one panel for each model, work and batch; nothing where there is nothing to draw."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        is_time_of_attention = row.work.startswith(("prefill", "decode")) and row.context
        if is_time_of_attention and not row.work.endswith(("step", "same binary")):
            batch = f", batch {row.batch}" if row.work == "decode" else ""
            panels[f"{row.model}: {row.work}{batch} [{row.unit}]"][row.backend].append((row.context, row.value))
    wide = {name: lines for name, lines in panels.items() if max(map(len, lines.values())) > 1}
    if not wide:
        return
    figure, axes = _panels(len(wide), height=4)
    for (name, lines), axis in zip(wide.items(), axes, strict=True):
        for backend, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=backend)
        axis.set(title=name, xscale="log", yscale="log", xlabel="tokens of context")
        axis.legend(fontsize=6)
    _save(figure, path)


def draw_ratios(rows: Sequence[Row], path: Path) -> None:
    """A bar for each row that is compared, above 1 where ours is better; nothing where none is."""
    compared = [row for row in rows if row.ratio is not None]
    if not compared:
        return
    figure, (axis,) = _panels(1, height=1 + 0.25 * len(compared))
    shapes = [f"{row.model}, {row.work}, {row.batch} x {row.context}" for row in compared]
    names = [f"{shape}: {row.backend} / {row.reference}" for shape, row in zip(shapes, compared, strict=True)]
    axis.barh(range(len(compared)), [row.ratio for row in compared], color="tab:blue")
    axis.set_yticks(range(len(compared)), names, fontsize=6)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.set(xlabel="ratio, above 1: ours is better")
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


def _panels(count: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height * count))
    return figure, figure.subplots(count, 1, squeeze=False)[:, 0]


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"# drew {path}", flush=True)
