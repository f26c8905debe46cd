"""Files of a report against the rows that they were made of, read back with pandas and json."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated_run import Clock
from test_store import SEED, run

from sarathi.messages import MemoryStats
from sarathi.metrics.environment import git_revision
from sarathi.metrics.records import RunRows, merge
from sarathi.metrics.report import FILES, ReportOptions, remove_report, summarize, write_report
from sarathi.metrics.store import MetricsStore
from sarathi.metrics.tables import BATCH_COUNTS, BATCH_TIMES, REQUEST_COUNTS, REQUEST_TIMES, describe, memory_table

OPTIONS = ReportOptions(operations=True, cpu_operations=True, config={"model": {"name": "none"}})


@pytest.fixture(scope="module")
def rows() -> RunRows:
    simulation = run("vllm", SEED)
    store = simulation.store
    simulation.arrive("last", prompt=3, output=1)
    store.on_operation("attn_decode", None, 0.002, on_device=True)
    store.on_operation("sample", simulation.clock.now_s, 0.001)
    for mapped, driver_s in ((4096, 0.5), (8192, 0.75)):
        simulation.step()
        store.on_memory(MemoryStats(mapped_bytes=mapped, idle_bytes=100, driver_s=driver_s, peak_mapped_bytes=mapped))
    return store.rows()


@pytest.fixture(scope="module")
def folder(rows: RunRows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(rows, folder, OPTIONS)
    return folder


def test_request_csv_has_the_names_and_values(rows: RunRows, folder: Path) -> None:
    table = pd.read_csv(folder / "sequence_metrics.csv", index_col="Request Id")
    assert list(table.columns) == [*REQUEST_TIMES, *REQUEST_COUNTS]
    for record in rows.requests:
        for name in (*REQUEST_TIMES, *REQUEST_COUNTS):
            expected = getattr(record, name)
            assert table.loc[record.request_id, name] == pytest.approx(
                np.nan if expected is None else expected, nan_ok=True
            )


def test_batch_csv(rows: RunRows, folder: Path) -> None:
    table = pd.read_csv(folder / "batch_metrics.csv")
    assert list(table.columns) == ["Batch Id", *BATCH_COUNTS, *BATCH_TIMES]
    assert table["batch_num_tokens"].tolist() == [step.num_tokens for step in rows.steps]
    starts = np.array([step.times.started_at_s for step in rows.steps])
    ends = np.array([step.times.ended_at_s for step in rows.steps])
    assert table["inter_batch_delay"][1:].to_numpy() == pytest.approx(starts[1:] - ends[:-1])
    assert np.isnan(table["inter_batch_delay"][0])


def test_token_csv_holds_every_gap(rows: RunRows, folder: Path) -> None:
    column = "decode_token_execution_plus_preemption_time_list"
    table = pd.read_csv(folder / "token_metrics.csv", index_col="Decode Token Id")[column]
    assert len(table) == sum(len(record.token_gaps_s) for record in rows.requests)
    record = max(rows.requests, key=lambda record: len(record.token_gaps_s))
    gaps = [table[f"{record.request_id}_{index}"] for index in range(1, len(record.token_times_s))]
    assert gaps == pytest.approx(record.token_gaps_s)


def test_quantiles_are_those_of_pandas(rows: RunRows, folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    table = pd.read_csv(folder / "sequence_metrics.csv")
    for name in ("request_e2e_time_normalized", "prefill_e2e_time", "request_num_tokens"):
        described = summary["metrics"][name]
        for key, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)):
            assert described[key] == pytest.approx(table[name].quantile(quantile))
        assert described["mean"] == pytest.approx(table[name].mean())
        assert described["count"] == len(table)


def test_summary_says_what_was_run_and_where(rows: RunRows, folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    tokens = sum(len(record.token_times_s) for record in rows.requests)
    assert summary["config"] == {"model": {"name": "none"}}
    assert summary["environment"]["python"] and "git" in summary["environment"]
    assert summary["num_completed"] == len(rows.requests)
    assert summary["throughput"]["decode_tokens_per_s"] == pytest.approx(tokens / summary["duration_s"])
    assert summary["memory"]["driver_s"] == 0.25


def test_git_revision_is_that_of_the_checkout() -> None:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    found = git_revision()
    assert (found["commit"] if found else "") == done.stdout.strip()


def test_cdf_and_series(rows: RunRows, folder: Path) -> None:
    cdf = pd.read_csv(folder / "plots" / "request_e2e_time.csv")
    assert list(cdf.columns) == ["request_e2e_time", "cdf"]
    assert cdf["request_e2e_time"].is_monotonic_increasing and cdf["cdf"].iloc[-1] == 1.0
    totals = {name: len(rows.requests) for name in ("request_arrival", "request_completion")}
    totals |= {"prefill_completion": sum(record.num_prompt_tokens for record in rows.requests)}
    totals |= {"decode_completion": sum(len(record.token_times_s) for record in rows.requests)}
    for name, total in totals.items():
        series = pd.read_csv(folder / "plots" / f"{name}.csv")
        assert series["Time (sec)"].is_monotonic_increasing and series["Time (sec)"].min() >= 0
        assert series[name].iloc[-1] == total


def test_plots_are_images(folder: Path) -> None:
    for csv in (folder / "plots").glob("*.csv"):
        assert csv.with_suffix(".png").read_bytes().startswith(b"\x89PNG"), csv


def test_operations_in_milliseconds(rows: RunRows, folder: Path) -> None:
    device = pd.read_csv(folder / "operation_metrics.csv")
    assert device["attn_decode"].tolist() == [2.0]
    cpu = pd.read_csv(folder / "cpu_operation_metrics.csv")
    parts = cpu[["schedule", "model_execution_e2e", "process_model_outputs"]].sum(axis=1)[: len(rows.steps)]
    assert parts.to_numpy() == pytest.approx([1e3 * step.duration_s for step in rows.steps])
    assert cpu["sample"].dropna().tolist() == [1.0]


def test_trace_has_a_track_a_request_and_no_step_overlaps(rows: RunRows, folder: Path) -> None:
    events = json.loads((folder / "chrome_trace.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {f"request {record.request_id}" for record in rows.requests} < tracks
    steps = [event for event in events if event["ph"] == "X" and event["name"].startswith("step ")]
    assert len(steps) == len(rows.steps)
    for before, after in pairwise(steps):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    index, record = next(
        (index, record) for index, record in enumerate(rows.requests) if record.request_num_decode_tokens > 1
    )
    decode = next(event for event in events if event["name"] == "decode" and event["tid"] == index)
    assert decode["dur"] == pytest.approx(1e6 * (record.finished_at_s - record.first_token_at_s))
    assert {"attn_decode", "mapped bytes"} <= {event["name"] for event in events}
    (mapping,) = [event for event in events if event["name"].startswith("map pages")]
    first, second = rows.memory
    assert mapping["dur"] == pytest.approx(1e6 * (second.at_s - first.at_s)) and mapping["args"] == {"mapping_ms": 250}


def test_schedule_has_one_line_a_step(rows: RunRows, folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "schedule.jsonl").read_text().splitlines()]
    assert [sum(chunk[2] for chunk in line["chunks"]) for line in lines] == [step.num_tokens for step in rows.steps]


def test_pages_and_mapping_time_are_differences() -> None:
    clock = Clock()
    store = MetricsStore(clock, page_bytes=1024)
    for mapped, driver_s, waited in ((2048, 1.0, 1), (5120, 1.5, 3)):
        clock.now_s += 1
        store.on_memory(MemoryStats(mapped_bytes=mapped, driver_s=driver_s, steps_waited=waited))
    first, second = memory_table(store.rows()).rows
    assert (first["kv_pages_mapped"], second["kv_pages_mapped"]) == (2, 5)
    assert (first["kv_mapping_time"], second["kv_mapping_time"]) == (0, 0.5)
    assert second["kv_steps_waited"] == 2


def test_report_of_nothing_is_written(tmp_path: Path) -> None:
    summary = write_report(MetricsStore(Clock()).rows(), tmp_path, ReportOptions())
    assert (summary["num_requests"], summary["throughput"]["tokens_per_s"]) == (0, 0.0)


def test_a_report_is_removed_and_nothing_else(rows: RunRows, tmp_path: Path) -> None:
    own = [tmp_path / "notes.csv", tmp_path / "plots" / "mine.png"]
    options = ReportOptions(operations=True, cpu_operations=True)
    write_report(rows, tmp_path, options)
    assert len(list(tmp_path.iterdir())) == len(FILES) + 1
    for path in own:
        path.write_text("mine")
    remove_report(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == own
    remove_report(tmp_path / "nowhere")


def test_report_of_merged_replicas(tmp_path: Path) -> None:
    parts = [run("sarathi", SEED + replica, replica=replica).store.rows() for replica in range(2)]
    write_report(merge(parts), tmp_path, ReportOptions(plots=False))
    table = pd.read_csv(tmp_path / "sequence_metrics.csv", index_col="Request Id")
    assert table.index.str.startswith("0_").sum() == table.index.str.startswith("1_").sum() == 25
    assert summarize(merge(parts))["num_completed"] == 50


def test_describe_by_numpy() -> None:
    values = np.random.default_rng(SEED).lognormal(size=1000)
    described = describe(values.tolist())
    assert described["p99"] == pytest.approx(np.percentile(values, 99))
    assert described["sum"] == pytest.approx(values.sum())


def test_metrics_import_no_plotting_and_no_torch() -> None:
    code = "import sys, sarathi.metrics.report, sarathi.metrics.wandb_log; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "wandb", "pandas"} & set(loaded)
