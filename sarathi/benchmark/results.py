"""Result files of a run: report, configuration and responses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.original_files import remove_original_files, write_original_files
from sarathi.benchmark.run.outcome import COMPLETED, DIED, RunOutcome
from sarathi.benchmark.workload.sharing import PrefixReuse
from sarathi.config.load import load_config, to_dict
from sarathi.metrics import merge
from sarathi.metrics.environment import environment
from sarathi.metrics.files import open_replacing, write_json
from sarathi.metrics.report import SUMMARY_FILE, ReportOptions, remove_report, write_report
from sarathi.metrics.wandb_log import WandbTarget, log_report

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.yml"
RESPONSES_FILE = "responses.json"
HEADLINES = (
    ("request_e2e_time_normalized", "normalized latency"),
    ("prefill_e2e_time", "time to first token"),
    ("decode_token_execution_plus_preemption_time", "time between tokens"),
)


def write_results(config: BenchmarkConfig, outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
    """Write everything into output_dir, replacing an older run's files; returns the summary."""
    remove_results(Path(config.output_dir), keep_profiles=config.enable_profiling)
    folder = write_config(config)
    status = _status(outcomes)
    responses = [each for outcome in outcomes for each in outcome.responses]
    if responses:
        write_json(folder / RESPONSES_FILE, {each["request_id"]: each for each in responses})
    found = [outcome.records for outcome in outcomes if outcome.records is not None]
    records = merge(found) if found else None
    write_original_files(config, outcomes)
    if records is None:
        summary = status | {"environment": environment(), "config": to_dict(config)}
        write_json(folder / SUMMARY_FILE, summary)
        return summary
    return write_report(records, folder, _options(config), status)


def in_own_folder(config: BenchmarkConfig) -> BenchmarkConfig:
    """`config` with a new timestamped folder in output_dir if timestamped_output is set.

    Otherwise logs a warning if this run will replace results of another configuration.
    """
    folder = Path(config.output_dir)
    if config.timestamped_output:
        return replace(config, output_dir=str(folder / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")))
    with suppress(OSError, ValueError):
        older = read_config(folder)
        if (folder / SUMMARY_FILE).exists() and replace(older, output_dir=config.output_dir) != config:
            warning = (
                "%r holds results of another configuration, which this run replaces; --timestamped_output keeps both"
            )
            logger.warning(warning, config.output_dir)
    return config


def remove_results(folder: Path, keep_profiles: bool) -> None:
    """Remove an older run's files, and nothing else."""
    remove_report(folder)
    remove_original_files(folder)
    (folder / RESPONSES_FILE).unlink(missing_ok=True)
    for path in [] if keep_profiles else folder.glob("profile_*.json"):
        path.unlink()


def write_config(config: BenchmarkConfig) -> Path:
    """Write the configuration into output_dir, created if necessary; returns the folder."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open_replacing(folder / CONFIG_FILE) as file:
        file.write(yaml.safe_dump(to_dict(config), sort_keys=False))
    return folder


def read_config(folder: Path) -> BenchmarkConfig:
    """The configuration of a run in `folder`."""
    return load_config(BenchmarkConfig, folder / CONFIG_FILE)


def describe_run(summary: Mapping[str, Any]) -> str:
    """A summary in a few lines of text."""
    lines = [f"{summary['ended']}: {summary['num_finished']} requests in {summary['run_s']:.2f} s"]
    if engine := summary.get("engine"):
        shown = "engine: {backend}, {dtype} on {device}, KV cache of {kv_cache_tokens} tokens"
        lines.append(shown.format(**engine))
    reuse = PrefixReuse(**summary["prefix_reuse"])
    if reuse.num_repeated or reuse.num_found:
        lines.append(str(reuse))
    if summary["num_lost"]:
        lines.append(f"lost with a dead replica: {summary['num_lost']} requests")
    if summary["refused"]:
        lines.append(
            f"refused: {len(summary['refused'])} requests, the first: {next(iter(summary['refused'].values()))}"
        )
    metrics = summary.get("metrics", {})
    for name, words in HEADLINES:
        if name in metrics:
            quantiles = ", ".join(f"{key} {1e3 * metrics[name][key]:.2f}" for key in ("p50", "p90", "p99"))
            lines.append(f"{words}, ms: {quantiles}")
    for name, value in summary.get("throughput", {}).items():
        lines.append(f"{name}: {value:.1f}")
    return "\n".join(lines)


def _status(outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
    """Status of the run: totals over the replicas, and the first ending that is not COMPLETED."""
    endings = [outcome.ended for outcome in outcomes if outcome.ended != COMPLETED]
    return {
        "ended": endings[0] if endings else COMPLETED,
        "run_s": max(outcome.duration_s for outcome in outcomes),
        "num_finished": sum(outcome.num_finished for outcome in outcomes),
        "refused": {name: why for outcome in outcomes for name, why in outcome.refused.items()},
        "num_lost": sum(len(outcome.requests) for outcome in outcomes if outcome.ended == DIED),
        "prefix_reuse": PrefixReuse(*map(sum, zip(*[each.reuse for each in outcomes], strict=True)))._asdict(),
        "engine": next((dict(outcome.engine) for outcome in outcomes if outcome.engine), {}),
    }


def _options(config: BenchmarkConfig) -> ReportOptions:
    knobs = config.metrics_store
    return ReportOptions(
        plots=knobs.write_plots,
        chrome_trace=config.write_chrome_trace,
        individual_batches=knobs.keep_individual_batch_metrics,
        operations=knobs.enable_op_level_metrics,
        cpu_operations=knobs.enable_cpu_op_level_metrics,
        config=to_dict(config),
    )


def send_results(config: BenchmarkConfig, summary: Mapping[str, Any]) -> None:
    """Upload the results to Weights & Biases if wandb_project is set. WandbError if that fails."""
    knobs = config.metrics_store
    if knobs.wandb_project:
        names = (knobs.wandb_project, knobs.wandb_group, knobs.wandb_run_name, knobs.wandb_run_id, knobs.wandb_sweep_id)
        log_report(Path(config.output_dir), summary, WandbTarget(*names))
