"""What a run adds to its row of a table, and the lines that are drawn of it, figure by figure. Knows no other run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.experiment.collect import FinishedRun
from sarathi.metrics.plots import Points
from sarathi.metrics.tables import BATCH_ID, TIME, cdf

Row = dict[str, Any]


def makespan(run: FinishedRun) -> Row:
    """All requests arrive at time zero, so the last one's end is the makespan."""
    seconds = run.quantile("request_e2e_time", "max")
    count = run.summary["num_completed"]
    rate = 60 * count / seconds if seconds else None
    return {"makespan_s": seconds, "requests_per_minute": rate}


def latency(run: FinishedRun) -> Row:
    """Normalized latency: seconds from arrival to end, for each output token."""
    row: Row = {key: run.quantile("request_e2e_time_normalized", key) for key in ("p50", "p90", "p99")}
    row |= {f"ttft_{key}": run.quantile("prefill_e2e_time", key) for key in ("p50", "p99")}
    gaps = "decode_token_execution_plus_preemption_time"
    return row | {"tbt_p99": run.quantile(gaps, "p99"), "duration_s": run.summary["duration_s"]}


def prefill(run: FinishedRun) -> Row:
    """Prompt tokens a second over steps that hold nothing else."""
    steps = [step for step in run.table("batch_metrics") if not step["batch_num_decode_tokens"]]
    tokens, seconds = _total(steps, "batch_num_prefill_tokens"), _total(steps, "batch_execution_time")
    context = run.config.uniform_request_length_generator.max_tokens
    return {"context": context, "prefill_tokens_per_s": tokens / seconds if seconds else None}


def decode(run: FinishedRun) -> Row:
    """Tokens a second over steps in which every slot of the batch decodes, and how fast they ask for memory."""
    size = run.config.replica_scheduler.max_batch_size
    steps = [
        step
        for step in run.table("batch_metrics")
        if step["batch_num_decode_tokens"] == step["batch_num_tokens"] == size
    ]
    seconds = _total(steps, "batch_execution_time")
    rate = size * len(steps) / seconds if seconds else None
    row: Row = {"batch_size": size, "num_steps": len(steps), "decode_tokens_per_s": rate}
    median_s = float(np.median([step["batch_execution_time"] or 0.0 for step in steps])) if steps else None
    row["median_step_ms"] = None if median_s is None else 1e3 * median_s
    return row | {"allocated_bytes_per_s": allocation_rate(run, {step[BATCH_ID] for step in steps})}


def allocation_rate(run: FinishedRun, steps: Set[float | None]) -> float | None:
    """Bytes a second by which memory in use grows between the first and the last look at it in these steps."""
    seen = [sample for sample in run.table("memory_metrics") if sample.get(BATCH_ID) in steps]
    if len(seen) < 2:
        return None
    used = [(sample["kv_mapped_bytes"] or 0.0) - (sample["kv_idle_bytes"] or 0.0) for sample in seen]
    seconds = (seen[-1][TIME] or 0.0) - (seen[0][TIME] or 0.0)
    return (used[-1] - used[0]) / seconds if seconds else None


def decode_steps(run: FinishedRun) -> Row:
    """How long decode steps take, and how often one waited for pages."""
    times = decode_step_times_ms(run)
    quantiles = np.quantile(times, [0.5, 0.9, 0.99, 1.0]).tolist() if times else [None] * 4
    row: Row = dict(zip(("p50_ms", "p90_ms", "p99_ms", "max_ms"), quantiles, strict=True))
    memory = run.summary["memory"]
    return row | {"num_steps": len(times), "steps_waited": memory["steps_waited"], "mapping_s": memory["driver_s"]}


def decode_step_times_ms(run: FinishedRun) -> list[float]:
    """Durations of steps without prefill, in order."""
    steps = run.table("batch_metrics")
    return [1e3 * (step["batch_execution_time"] or 0.0) for step in steps if not step["batch_num_prefill_tokens"]]


def decode_step_line(run: FinishedRun) -> Points:
    """Every decode step in order, and how long it took in ms."""
    times = decode_step_times_ms(run)
    return range(len(times)), times


def between_tokens(run: FinishedRun) -> Row:
    """Seconds between two tokens of a request, and what they cost: the time to the first one and to the last of all."""
    row: Row = {"chunk_size": budget(run.config)}
    gaps = "decode_token_execution_plus_preemption_time"
    row |= {f"tbt_{key}": run.quantile(gaps, key) for key in ("p50", "p90", "p99", "max")}
    row |= {f"ttft_{key}": run.quantile("prefill_e2e_time", key) for key in ("p50", "p99")}
    return row | {"duration_s": run.summary["duration_s"]}


def token_gap_cdf(run: FinishedRun) -> Points:
    """The share of times between tokens that are not larger than x seconds."""
    return cdf([gap for row in run.table("token_metrics") for gap in row.values() if gap is not None])


def budget(config: BenchmarkConfig) -> int | None:
    """Tokens of a step, where the policy has a fixed number of them."""
    knobs = config.sarathi_scheduler
    is_fixed = knobs.target_step_time is None and not knobs.enable_dynamic_chunking_schedule
    sizes = {
        "sarathi": knobs.chunk_size if is_fixed else None,
        "simple_chunking": config.simple_chunking_scheduler.chunk_size,
    }
    return sizes.get(config.replica_scheduler.provider)


def budget_name(config: BenchmarkConfig) -> str:
    """What bounds a step, fixed, learned or scheduled: "512 tokens a step"; empty for a policy without a budget."""
    knobs, fixed = config.sarathi_scheduler, budget(config)
    if fixed is not None:
        return f"{fixed} tokens a step"
    if config.replica_scheduler.provider != "sarathi":
        return ""
    if knobs.target_step_time is not None:
        return f"{knobs.target_step_time:g} s a step"
    return f"{knobs.high_chunk_size} to {knobs.low_chunk_size} tokens a step"


def _total(steps: Sequence[Mapping[str, float | None]], column: str) -> float:
    return sum(step[column] or 0.0 for step in steps)
