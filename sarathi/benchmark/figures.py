"""Draw NAME.png from the measurements in NAME.csv."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from sarathi.benchmark.records import BOUND
from sarathi.config.backend import BackendSpec
from sarathi.metrics import plots
from sarathi.metrics.environment import caption
from sarathi.metrics.plots import AGAINST, LIGHT, OTHERS, OURS, Panels

MIB = 2**20
ENVIRONMENT_FILE = "environment.json"
NO_MODEL = "none"  # model of records that involve none
LABELS = {
    "p50": "P50 normalized latency (s/token)", "p90": "P90 normalized latency (s/token)",
    "p99": "P99 normalized latency (s/token)", "qps": "request rate (requests/s)", "makespan_s": "makespan (s)",
    "prefill_tokens_per_s": "prefill (tokens/s)", "decode_tokens_per_s": "decode (tokens/s)",
    "context": "context (tokens)", "batch_size": "batch size (requests)", "max_batch": "requests that fit",
}  # fmt: skip
END_TO_END_UNITS = ("s", "ms/token", "output tokens/s", "tokens", "requests")  # not a share of another record


def draw(path: Path) -> None:
    """Draw a table's figure next to it. Does nothing for tables without a figure or without comparable records.

    The caption names models, hardware and revision, from NAME.environment.json or the folder's environment.json.
    """
    figure = next((make for pattern, make in FIGURES.items() if fnmatch(path.stem, pattern)), None)
    if figure is None or not plots.is_available():
        return
    table = pd.read_csv(path)
    panels = None if table.empty else figure(table)
    if panels is not None:
        panels.save(path.with_suffix(".png"), caption(read_environments(path), _models(path, table)))
        print(f"# drew {path.with_suffix('.png')}", flush=True)


def _models(path: Path, table: pd.DataFrame) -> list[str]:
    """Models of a table, or of its main table."""
    main = path.with_name(f"{_main_table(path)}.csv")
    named = table if "model" in table or not main.exists() else pd.read_csv(main)
    return [name for name in named["model"].unique() if name != NO_MODEL] if "model" in named else []


def _main_table(path: Path) -> str:
    """The table written by the same run: "allocator" for allocator_steps.csv."""
    return path.stem.partition("_")[0]


def read_environments(path: Path) -> list[Mapping[str, Any]]:
    """The environments of the runs that wrote a table; empty if unknown."""
    names = (path.stem, _main_table(path))
    places = [*(path.with_name(f"{name}.{ENVIRONMENT_FILE}") for name in names), path.with_name(ENVIRONMENT_FILE)]
    found = next((place for place in places if place.exists()), None)
    content = [] if found is None else json.loads(found.read_text(encoding="utf-8"))
    return list(content.get(path.name, [content]) if isinstance(content, Mapping) else content)


def _grid(count: int, height: float, columns: int = 2, width: float = 6.0) -> Panels:
    """At least `count` panels of equal size."""
    columns = min(columns, count)
    return Panels(columns, width, [height] * -(-count // columns))


def _ratios(records: pd.DataFrame) -> Panels | None:
    """A row of panels for each reference, a column for each model. The roofline's panels show percent of it."""
    compared = records.dropna(subset=["ratio"])
    if compared.empty:
        return None
    models = compared["model"].unique()
    rows = [group for _, group in compared.groupby("reference", sort=False)]
    tallest = [row["model"].value_counts().max() for row in rows]
    panels = Panels(len(models), 7.0, [0.9 + 0.2 * height for height in tallest])
    for axis, (row, model) in zip(panels.axes, itertools.product(rows, models), strict=True):
        if (row["model"] == model).any():
            _draw_ratios(axis, row[row["model"] == model])
    return panels


def _draw_ratios(axis: Any, records: pd.DataFrame) -> None:
    """Draw the ratios of one model's records to one reference."""
    reference = records["reference"].iloc[0]
    tasks = records.apply(_task, axis=1)
    tasks = tasks.where(~tasks.duplicated(keep=False), tasks + ": " + records["backend"])
    ratios = records.set_index(tasks)["ratio"]
    if reference == BOUND:
        plots.draw_bars(axis, (100 * ratios).to_dict(), f"share of the bound ({reference}), %")
    else:
        plots.draw_ratios(axis, ratios.to_dict(), f"ratio to {reference}; above 1: better")
    axis.set_title(records["model"].iloc[0], fontsize=10)


def _whole_work(records: pd.DataFrame) -> Panels | None:
    """End-to-end ratios: without breakdowns and single steps, and decode only at the shortest context."""
    is_part = records["work"].str.contains(": ") | ~records["unit"].isin(END_TO_END_UNITS)
    decodes = records["work"] == "decode"
    is_longer = decodes & (records["context"] > records.loc[decodes, "context"].min())
    return _by_size(records[~is_part & ~is_longer])


def _by_size(records: pd.DataFrame) -> Panels | None:
    """Ratios, the records of each workload sorted by context and batch."""
    work = records.groupby("work", sort=False).ngroup()
    return _ratios(records.assign(order=work).sort_values(["order", "context", "batch"], kind="stable"))


def _task(record: pd.Series) -> str:
    """The workload with batch and context, unless its name already has number and lengths of the requests."""
    names_shape = "requests" in record["work"] or not record["context"]
    return str(record["work"]) if names_shape else f"{record['work']}, {record['batch']} x {_tokens(record['context'])}"


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count and count % 1024 == 0 else str(count)


def _kernels(records: pd.DataFrame) -> Panels | None:
    """Time relative to the best paged kernel, over context; a panel for each workload, batch and model."""
    is_time = records["work"].str.fullmatch(r"decode|prefill|prefill \d+") & (records["context"] > 0)
    times = records[is_time].drop_duplicates(["model", "work", "batch", "context", "backend"], keep="last")
    found = times.groupby(["work", "batch", "model"])
    groups = [(key, group) for key, group in found if group["context"].nunique() > 1]
    if not groups:
        return None
    panels = _grid(len(groups), 2.4)
    for axis, ((work, batch, model), group) in zip(panels.axes, groups, strict=False):
        _draw_kernels(axis, group.pivot(index="context", columns="backend", values="value"))
        axis.set_title(f"{model}: {work}" + (f", batch {batch}" if work == "decode" else ""), fontsize=10)
    panels.legend(panels.axes[0])
    return panels


def _draw_kernels(axis: Any, times: pd.DataFrame) -> None:
    """times: context x kernel. The engine decodes with its own kernel and prefills with FlashAttention 3."""
    paged = times.filter(like="paged")
    reference = times if paged.empty else paged
    over = times.div(reference.min(axis=1), axis=0)
    choices = over.filter(regex="triton default|one sequence").join(over.filter(regex=r"^fa3 contiguous \(fa3-fwd"))
    families: dict[str, tuple[pd.DataFrame, dict[str, Any]]] = {
        "paged kernels": (over[paged.columns], {"color": OTHERS, "linewidth": 0.8}),
        "other kernels on contiguous memory": (over.drop(columns=paged.columns), {"color": LIGHT, "linewidth": 0.8}),
        "the engine's kernel, on contiguous memory": (
            choices.bfill(axis=1).iloc[:, :1],
            {"color": OURS, "linewidth": 2.2},
        ),
    }
    for name, (lines, style) in families.items():
        labels = [name, *["_"] * (lines.shape[1] - 1)][: lines.shape[1]]
        axis.plot(lines.index, lines.to_numpy(), marker=".", markersize=4, label=labels, **style)
    axis.axhline(1.0, color="black", linewidth=0.6)
    axis.set(
        xscale="log",
        xlabel=LABELS["context"],
        ylabel="time / best" + ("" if paged.empty else " paged"),
        ylim=(None, min(axis.get_ylim()[1], 1.6)),
    )
    axis.set_xticks(over.index, [_tokens(context) for context in over.index], fontsize=7)
    axis.set_xticks([], minor=True)


def _steps(steps: pd.DataFrame) -> Panels:
    """Every decode step of each backend, and the percentiles. Runs on premapped slots are the reference."""
    in_order = (OTHERS, AGAINST, OURS)  # the last one is drawn on top

    def color(name: str) -> str:
        return OTHERS if "mapped before" in name else AGAINST if "sync" in name else OURS

    samples = dict(sorted(steps.groupby("backend")["ms"], key=lambda item: in_order.index(color(item[0]))))
    panels = Panels(2, 6.0, [3.8])
    over_time, tails = panels.axes
    for name, times in samples.items():
        size = 4 if color(name) == AGAINST else 1.5
        over_time.plot(range(len(times)), times, ".", markersize=size, color=color(name), label=name)
    over_time.set(xlabel="decode step", ylabel="time of the step (ms)", yscale="log")
    plots.draw_tails(tails, samples, "time of a step (ms)", list(map(color, samples)))
    tails.set_xscale("log")
    return panels


def _page_sizes(records: pd.DataFrame) -> Panels:
    """A panel for each model and number of GPUs."""
    groups = list(records.groupby(["model", "tensor_parallel"], sort=False))
    panels = _grid(len(groups), 1.9, columns=records["tensor_parallel"].nunique())
    for axis, ((model, gpus), group) in zip(panels.axes, groups, strict=False):
        pages = group["page_kib"].map(lambda kib: f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB")
        heights = group.set_index(pages + " " + group["layout"])["max_batch"].to_dict()
        plots.draw_bars(axis, heights, LABELS["max_batch"])
        axis.set_title(f"{model}, {gpus} GPU{'s' * (gpus > 1)}", fontsize=10)
    return panels


def _makespans(records: pd.DataFrame) -> Panels | None:
    """A panel for each model and workload; virtual-memory backends in colour."""
    groups = list(records.dropna(subset=["makespan_s"]).groupby(["model", "workload"], sort=False))
    if not groups:
        return None
    panels = _grid(len(groups), 1 + 0.25 * max(len(group) for _, group in groups))
    for axis, ((model, workload), group) in zip(panels.axes, groups, strict=False):
        names = _names(group)
        virtual = names[~_is_paged(group["backend"])]
        plots.draw_bars(axis, group.set_index(names)["makespan_s"].to_dict(), LABELS["makespan_s"], list(virtual))
        axis.set_title(f"{model}: {workload}", fontsize=10)
    return panels


def _lines(records: pd.DataFrame, x: str, ys: tuple[str, ...]) -> Panels | None:
    """A row for each model, a column for each y: lines over x, one for each backend and variant."""
    known = records.dropna(subset=[x, *ys]).sort_values(x)
    models = list(known.groupby("model", sort=False))
    if not models:
        return None
    panels = Panels(len(ys), 5.0, [3.2] * len(models))
    for axis, ((model, group), y) in zip(panels.axes, itertools.product(models, ys), strict=True):
        virtual_first = group.assign(name=_names(group)).sort_values("backend", key=_is_paged, kind="stable")
        lines = {name: (line[x], line[y]) for name, line in virtual_first.groupby("name", sort=False)}
        plots.draw_lines(axis, lines, LABELS[x], LABELS[y], marker="o")
        axis.set_title(model, fontsize=10)
    return panels


def _percentiles(records: pd.DataFrame, columns: tuple[str, ...], label: str) -> Panels | None:
    """A panel for each model: percentiles of each run, on a logarithmic axis."""
    models = list(records.groupby("model", sort=False))
    panels = _grid(len(models), 3.2)
    for axis, (model, group) in zip(panels.axes, models, strict=False):
        for name, values in zip(_names(group), group[[*columns]].to_numpy(), strict=True):
            axis.plot(values, range(len(columns)), marker="o", label=name)
        axis.set_yticks(range(len(columns)), ["P50", "P90", "P99", "max"])
        axis.set(xlabel=label, xscale="log", title=model)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return panels


def _memory(table: pd.DataFrame) -> Panels:
    """Used, wasted, idle, mapped and held bytes over the steps of a run; a panel for each backend, on one scale."""
    runs = list(table.groupby("backend", sort=False))
    panels = Panels(columns=len(runs), width=3.6, heights=(3.0,))
    top = 1.1 * table["kv_created_bytes"].max() / MIB
    for axis, (backend, run) in zip(panels.axes, runs, strict=True):
        kinds = ("created", "mapped", "wasted", "idle")
        created, mapped, wasted, idle = (run[f"kv_{kind}_bytes"] / MIB for kind in kinds)
        bands, names = [mapped - idle - wasted, wasted, idle], ["used by tokens", "wasted", "idle"]
        axis.stackplot(run["step"], bands, colors=[OTHERS, AGAINST, LIGHT], labels=names)
        axis.plot(run["step"], mapped, color=OURS, linewidth=0.8, label="mapped")
        axis.plot(run["step"], created, color="black", linewidth=1.2, linestyle="--", label="held")
        axis.set(title=backend, xlabel="step", ylabel="KV cache (MiB)", ylim=(0, top))
    panels.legend(panels.axes[0])
    return panels


def _is_paged(backends: pd.Series) -> pd.Series:
    return backends.map(lambda name: BackendSpec.parse(name).is_paged)


def _names(records: pd.DataFrame) -> pd.Series:
    """Backend and variant of each record."""
    variants = records["variant"].astype("string").fillna("") if "variant" in records else ""
    return (records["backend"] + " " + variants).str.strip()


FIGURES: Mapping[str, Callable[[pd.DataFrame], Panels | None]] = {
    "engine": _by_size,
    "layouts": _whole_work,
    "ragged": _ratios,
    "vllm": _whole_work,
    "kernels": _kernels,
    "allocator_steps": _steps,
    "max_batch*": _page_sizes,
    "makespan": _makespans,
    "memory": _memory,
    "latency": partial(_lines, x="qps", ys=("p50", "p90", "p99")),
    "prefill": partial(_lines, x="context", ys=("prefill_tokens_per_s",)),
    "between_tokens": partial(
        _percentiles, columns=("tbt_p50", "tbt_p90", "tbt_p99", "tbt_max"), label="time between tokens (s)"
    ),
    "decode_steps": partial(
        _percentiles, columns=("p50_ms", "p90_ms", "p99_ms", "max_ms"), label="time of a decode step (ms)"
    ),
    "decode": partial(_lines, x="batch_size", ys=("decode_tokens_per_s",)),
}
