"""Pictures of attention on contiguous against paged memory. Knows rows only."""

from collections import defaultdict
from pathlib import Path

from kernel_benchmark.table import Row


def draw(rows: list[Row], path: Path) -> None:
    """Time against context, one panel for each model and kind of work; nothing where there is nothing to draw."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.work.startswith(("prefill", "decode")) and row.context and "step" not in row.work:
            batch = f", batch {row.batch}" if row.work == "decode" else ""
            panels[f"{row.model}: {row.work}{batch}"][row.backend].append((row.context, row.value))
    wide = {name: lines for name, lines in panels.items() if max(map(len, lines.values())) > 1}
    if not wide:
        return
    figure, axes = pyplot.subplots(len(wide), 1, figsize=(9, 4 * len(wide)), squeeze=False)
    for (name, lines), axis in zip(wide.items(), axes[:, 0], strict=True):
        for backend, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=backend)
        unit = "ms" if "prefill" in name else "us"
        axis.set(title=name, xscale="log", yscale="log", xlabel="tokens of context", ylabel=unit)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
