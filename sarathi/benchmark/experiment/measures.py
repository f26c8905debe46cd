"""Measures of a run for each kind of table."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import pandas as pd

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.experiment.collect import FinishedRun
from sarathi.metrics.tables import BATCH_ID, TIME

Record = dict[str, Any]
TOKEN_GAPS, FIRST_TOKEN, SECONDS = (
    "decode_token_execution_plus_preemption_time",
    "prefill_e2e_time",
    "batch_execution_time",
)


def makespan(run: FinishedRun) -> Record:
    """All requests arrive at time zero, so the last one's end is the makespan."""
    seconds = run.quantile("request_e2e_time", "max")
    count = run.summary["num_completed"]
    return {"makespan_s": seconds, "requests_per_minute": 60 * count / seconds if seconds else None}


def latency(run: FinishedRun) -> Record:
    """Normalized latency: seconds from arrival to end, for each output token."""
    record = run.quantiles("", "request_e2e_time_normalized", "p50", "p90", "p99")
    record |= run.quantiles("ttft_", FIRST_TOKEN, "p50", "p99") | run.quantiles("tbt_", TOKEN_GAPS, "p99")
    return record | {"duration_s": run.summary["duration_s"]}


def between_tokens(run: FinishedRun) -> Record:
    """Time between tokens, time to first token, and makespan, in seconds."""
    record: Record = {"chunk_size": budget(run.config)}
    record |= run.quantiles("tbt_", TOKEN_GAPS, "p50", "p90", "p99", "max")
    return record | run.quantiles("ttft_", FIRST_TOKEN, "p50", "p99") | {"duration_s": run.summary["duration_s"]}


def prefill(run: FinishedRun) -> Record:
    """Prompt tokens per second over pure prefill steps."""
    steps = run.table("batch_metrics").query("batch_num_decode_tokens == 0")
    rate = _rate(steps["batch_num_prefill_tokens"].sum(), steps)
    return {"context": run.config.uniform_request_length_generator.max_tokens, "prefill_tokens_per_s": rate}


def decode(run: FinishedRun) -> Record:
    """Tokens per second over steps in which every slot decodes, and their memory allocation rate."""
    size = run.config.replica_scheduler.max_batch_size
    steps = run.table("batch_metrics").query(f"batch_num_decode_tokens == batch_num_tokens == {size}")
    record: Record = {
        "batch_size": size,
        "num_steps": len(steps),
        "decode_tokens_per_s": _rate(size * len(steps), steps),
    }
    record["median_step_ms"] = 1e3 * float(steps[SECONDS].median()) if len(steps) else None
    return record | {"allocated_bytes_per_s": allocation_rate(run, set(steps[BATCH_ID]))}


def allocation_rate(run: FinishedRun, steps: Set[object]) -> float | None:
    """Bytes per second by which the used memory grows between the first and last sample in these steps."""
    samples = run.table("memory_metrics")
    samples = samples[samples[BATCH_ID].isin(steps)]
    used = samples["kv_mapped_bytes"] - samples["kv_idle_bytes"]
    seconds = float(samples[TIME].iloc[-1] - samples[TIME].iloc[0]) if len(samples) > 1 else 0.0
    return float(used.iloc[-1] - used.iloc[0]) / seconds if seconds else None


def decode_steps(run: FinishedRun) -> Record:
    """Duration of steps without prefill, and how many waited for pages."""
    times = 1e3 * run.table("batch_metrics").query("batch_num_prefill_tokens == 0")[SECONDS]
    names = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "max_ms": 1.0}
    record: Record = {name: float(times.quantile(share)) if len(times) else None for name, share in names.items()}
    memory = run.summary["memory"]
    return record | {"num_steps": len(times), "steps_waited": memory["steps_waited"], "mapping_s": memory["driver_s"]}


def budget(config: BenchmarkConfig) -> int | None:
    """Token budget of a step; None if the policy has no fixed one."""
    knobs = config.sarathi_scheduler
    is_fixed = knobs.target_step_time is None and not knobs.enable_dynamic_chunking_schedule
    sizes = {
        "sarathi": knobs.chunk_size if is_fixed else None,
        "simple_chunking": config.simple_chunking_scheduler.chunk_size,
    }
    return sizes.get(config.replica_scheduler.provider)


def budget_name(config: BenchmarkConfig) -> str:
    """The budget of a step in words, e.g. "512 tokens a step"; empty for a policy without a budget."""
    knobs, fixed = config.sarathi_scheduler, budget(config)
    if fixed is not None:
        return f"{fixed} tokens a step"
    if config.replica_scheduler.provider != "sarathi":
        return ""
    if knobs.target_step_time is not None:
        return f"{knobs.target_step_time:g} s a step"
    return f"{knobs.high_chunk_size} to {knobs.low_chunk_size} tokens a step"


def _rate(tokens: float, steps: pd.DataFrame) -> float | None:
    seconds = float(steps[SECONDS].sum())
    return float(tokens) / seconds if seconds else None
