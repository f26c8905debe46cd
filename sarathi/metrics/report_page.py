"""report.html: one self-contained page with a run's memory, latency, load, metrics and configuration."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from sarathi.metrics.environment import caption
from sarathi.metrics.plots import Panels, Points, draw_lines, draw_tails
from sarathi.metrics.records import RunRecords
from sarathi.metrics.tables import distributions, time_series

LATENCIES = {
    "prefill_e2e_time": "time to first token (s)",
    "decode_token_execution_plus_preemption_time": "time between tokens (s)",
    "request_e2e_time_normalized": "normalized latency (s/token)",
}
STATISTICS = ("count", "mean", "min", "p50", "p90", "p99", "max")
MIB = 2**20
_STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 75em; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; font-size: 90% }
td, th { padding: 0.15em 0.8em; border-bottom: 1px solid #ddd; text-align: right } td:first-child { text-align: left }
"""


def report_page(records: RunRecords, summary: Mapping[str, Any]) -> str:
    """The HTML page of a run. summary: from report.summarize, with `environment` and `config`."""
    model = summary.get("config", {}).get("model", {})
    backend = summary.get("engine", {}).get("backend", model.get("attention_backend"))  # the resolved value of "auto"
    subject = [str(each) for each in (model.get("name"), backend) if each is not None]
    told = caption([summary["environment"]], subject)
    body = [f"<h1>{escape(' on '.join(subject)) or 'Run'}</h1>", f"<p>{escape(told)}</p>", _numbers(summary)]
    figures = (_memory(records), _latency(records), _load(records))
    body += [f'<p><img alt="" src="{figure.data_uri(told)}"></p>' for figure in figures if figure is not None]
    rows = [[name, *(f"{found[key]:.5g}" for key in STATISTICS)] for name, found in summary["metrics"].items()]
    body += ["<h2>Metrics</h2>", _table(["metric", *STATISTICS], rows)]
    for name in ("config", "environment"):
        text = escape(json.dumps(summary.get(name, {}), indent=2, default=str))
        body.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    head = f'<meta charset="utf-8"><title>{escape(" ".join(subject)) or "run"}</title><style>{_STYLE}</style>'
    return f"<!DOCTYPE html>\n<html><head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"


def _numbers(summary: Mapping[str, Any]) -> str:
    """A table of the run's counts and rates."""
    named = {name: summary[name] for name in ("num_requests", "num_completed", "num_steps", "duration_s")}
    return _table(["", "value"], [[name, f"{value:.6g}"] for name, value in {**named, **summary["throughput"]}.items()])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{cells}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _memory(records: RunRecords) -> Panels | None:
    """A panel for each replica: held, mapped, used and wasted bytes of its KV cache over time."""
    replicas = sorted({sample.replica for sample in records.memory})
    if not replicas:
        return None
    panels = Panels(1, 10.0, [3.0] * len(replicas))
    for axis, replica in zip(panels.axes, replicas, strict=True):
        samples = [sample for sample in records.memory if sample.replica == replica]
        times = [sample.at_s - records.origin_s for sample in samples]
        mib = {
            "held": [sample.stats.created_bytes / MIB for sample in samples],
            "mapped": [sample.stats.mapped_bytes / MIB for sample in samples],
            "used": [(sample.stats.mapped_bytes - sample.stats.idle_bytes) / MIB for sample in samples],
            "wasted": [sample.stats.wasted_bytes / MIB for sample in samples],
        }
        draw_lines(axis, {name: (times, values) for name, values in mib.items()}, "time (s)", "KV cache (MiB)")
        axis.set_ylim(bottom=0)
        axis.set_title("memory over time" + (f", replica {replica}" if len(replicas) > 1 else ""), fontsize=10)
    return panels


def _latency(records: RunRecords) -> Panels | None:
    """A percentile plot of each latency."""
    found = distributions(records)
    samples = {label: found[name] for name, label in LATENCIES.items() if name in found}
    if not samples:
        return None
    panels = Panels(len(samples), 10.0 / len(samples), [3.0])
    for axis, (label, values) in zip(panels.axes, samples.items(), strict=True):
        draw_tails(axis, {label: values}, label)
    return panels


def _load(records: RunRecords) -> Panels | None:
    """Requests that arrived and completed, and the batch of each step, over time."""
    series = time_series(records)
    if not series or not records.steps:
        return None
    requests: dict[str, Points] = {}
    for label, name in (("arrived", "request_arrival"), ("completed", "request_completion")):
        if name in series:
            times, totals = zip(*series[name], strict=True)
            requests[label] = times, totals
    ends = [step.times.ended_at_s - records.origin_s for step in records.steps]
    panels = Panels(2, 5.0, [3.0])
    draw_lines(panels.axes[0], requests, "time (s)", "requests")
    draw_lines(panels.axes[1], {"": (ends, [step.batch_size for step in records.steps])}, "time (s)", "batch size")
    return panels
