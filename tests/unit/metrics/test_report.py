"""Files of a report against the records that they were made of, read back with pandas and json."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import FrameType

import numpy as np
import pandas as pd
import pytest
from simulated_run import Clock
from test_store import SEED, run

from sarathi.messages import MemoryStats
from sarathi.metrics import files, report, report_page
from sarathi.metrics.environment import git_revision
from sarathi.metrics.records import OperationRecord, RunRecords, StepRecord, StepTimes, merge
from sarathi.metrics.report import (
    FILES,
    TABLES_FOLDER,
    ReportOptions,
    plots_folder,
    remove_report,
    summarize,
    write_report,
)
from sarathi.metrics.request_record import RequestRecord
from sarathi.metrics.store import MetricsStore
from sarathi.metrics.tables import BATCH_COUNTS, BATCH_TIMES, REQUEST_COUNTS, REQUEST_TIMES, describe, memory_table
from sarathi.metrics.trace import num_trace_events, trace_events

OPTIONS = ReportOptions(operations=True, cpu_operations=True, config={"model": {"name": "none"}})


@pytest.fixture(scope="module")
def records() -> RunRecords:
    simulation = run("vllm", SEED)
    store = simulation.store
    simulation.arrive("last", prompt=3, output=1)
    store.on_operation("attn_decode", None, 0.002, on_device=True)
    store.on_operation("sample", simulation.clock.now_s, 0.001)
    for mapped, driver_s in ((4096, 0.5), (8192, 0.75)):
        simulation.step()
        store.on_memory(MemoryStats(mapped_bytes=mapped, idle_bytes=100, driver_s=driver_s, peak_mapped_bytes=mapped))
    return store.records()


@pytest.fixture(scope="module")
def folder(records: RunRecords, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(records, folder, OPTIONS)
    return folder


def test_request_csv_has_the_names_and_values(records: RunRecords, folder: Path) -> None:
    table = pd.read_csv(folder / TABLES_FOLDER / "sequence_metrics.csv", index_col="Request Id")
    assert list(table.columns) == [*REQUEST_TIMES, *REQUEST_COUNTS]
    for record in records.requests:
        for name in (*REQUEST_TIMES, *REQUEST_COUNTS):
            expected = getattr(record, name)
            assert table.loc[record.request_id, name] == pytest.approx(
                np.nan if expected is None else expected, nan_ok=True
            )


def test_batch_csv(records: RunRecords, folder: Path) -> None:
    table = pd.read_csv(folder / TABLES_FOLDER / "batch_metrics.csv")
    assert list(table.columns) == ["Batch Id", *BATCH_COUNTS, *BATCH_TIMES]
    assert table["batch_num_tokens"].tolist() == [step.num_tokens for step in records.steps]
    starts = np.array([step.times.started_at_s for step in records.steps])
    ends = np.array([step.times.ended_at_s for step in records.steps])
    assert table["inter_batch_delay"][1:].to_numpy() == pytest.approx(starts[1:] - ends[:-1])
    assert np.isnan(table["inter_batch_delay"][0])


def test_token_csv_holds_every_gap(records: RunRecords, folder: Path) -> None:
    column = "decode_token_execution_plus_preemption_time_list"
    table = pd.read_csv(folder / TABLES_FOLDER / "token_metrics.csv", index_col="Decode Token Id")[column]
    assert len(table) == sum(len(record.token_gaps_s) for record in records.requests)
    record = max(records.requests, key=lambda record: len(record.token_gaps_s))
    gaps = [table[f"{record.request_id}_{index}"] for index in range(1, len(record.token_times_s))]
    assert gaps == pytest.approx(record.token_gaps_s)


def test_quantiles_are_those_of_pandas(records: RunRecords, folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    table = pd.read_csv(folder / TABLES_FOLDER / "sequence_metrics.csv")
    for name in ("request_e2e_time_normalized", "prefill_e2e_time", "request_num_tokens"):
        described = summary["metrics"][name]
        for key, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)):
            assert described[key] == pytest.approx(table[name].quantile(quantile))
        assert described["mean"] == pytest.approx(table[name].mean())
        assert described["count"] == len(table)


def test_summary_says_what_was_run_and_where(records: RunRecords, folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    tokens = sum(len(record.token_times_s) for record in records.requests)
    assert summary["config"] == {"model": {"name": "none"}}
    assert summary["environment"]["python"] and "git" in summary["environment"]
    assert summary["num_completed"] == len(records.requests)
    assert summary["throughput"]["decode_tokens_per_s"] == pytest.approx(tokens / summary["duration_s"])
    assert summary["memory"]["driver_s"] == 0.25


def test_git_revision_is_that_of_the_checkout() -> None:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    found = git_revision()
    assert (found["commit"] if found else "") == done.stdout.strip()


def test_cdf_and_series(records: RunRecords, folder: Path) -> None:
    cdf = pd.read_csv(plots_folder(folder) / "request_e2e_time.csv")
    assert list(cdf.columns) == ["request_e2e_time", "cdf"]
    assert cdf["request_e2e_time"].is_monotonic_increasing and cdf["cdf"].iloc[-1] == 1.0
    totals = {name: len(records.requests) for name in ("request_arrival", "request_completion")}
    totals |= {"prefill_completion": sum(record.num_prompt_tokens for record in records.requests)}
    totals |= {"decode_completion": sum(len(record.token_times_s) for record in records.requests)}
    for name, total in totals.items():
        series = pd.read_csv(plots_folder(folder) / f"{name}_time_series.csv")
        assert series["Time (sec)"].is_monotonic_increasing and series["Time (sec)"].min() >= 0
        assert series[name].iloc[-1] == total


class Page(HTMLParser):
    """What a page shows and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_stands_alone_and_shows_every_metric(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert page.open == [] and not list((plots_folder(folder)).glob("*.png"))
    images = [base64.b64decode(each.removeprefix("data:image/png;base64,")) for each in page.references]
    assert len(images) == 3 and all(image.startswith(b"\x89PNG") for image in images)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["metrics"]) <= set(page.texts)
    assert f"{summary['metrics']['request_e2e_time']['p99']:.5g}" in page.texts


def test_the_page_opens_with_memory_then_latency(
    records: RunRecords, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, list[str], list[float]]] = []

    def note(axis: object, lines: dict, x_label: str, y_label: str) -> None:
        drawn.append((y_label, list(lines), [values[-1] for _, values in lines.values()]))

    monkeypatch.setattr(report_page, "draw_lines", note)
    monkeypatch.setattr(report_page, "draw_tails", lambda axis, samples, label: drawn.append((label, [], [])))
    report_page.report_page(records, json.loads((folder / "summary.json").read_text()))
    stats = records.memory[-1].stats
    mapped, used, wasted = (each / 2**20 for each in (stats.mapped_bytes, 8192 - stats.idle_bytes, stats.wasted_bytes))
    held = stats.created_bytes / 2**20
    assert drawn[0] == ("KV cache (MiB)", ["held", "mapped", "used", "wasted"], [held, mapped, used, wasted])
    assert [label for label, *_ in drawn[1:4]] == list(report_page.LATENCIES.values())


def test_what_a_page_shows_is_escaped(records: RunRecords) -> None:
    summary = summarize(records) | {"environment": {}, "config": {"model": {"name": "<script>alert(1)</script>"}}}
    text = report_page.report_page(records, summary)
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_operations_in_milliseconds(records: RunRecords, folder: Path) -> None:
    device = pd.read_csv(folder / TABLES_FOLDER / "operation_metrics.csv")
    assert device["attn_decode"].tolist() == [2.0]
    cpu = pd.read_csv(folder / TABLES_FOLDER / "cpu_operation_metrics.csv")
    parts = cpu[["schedule", "model_execution_e2e", "process_model_outputs"]].sum(axis=1)[: len(records.steps)]
    assert parts.to_numpy() == pytest.approx([1e3 * step.duration_s for step in records.steps])
    assert cpu["sample"].dropna().tolist() == [1.0]


def test_trace_has_a_track_a_request_and_no_step_overlaps(records: RunRecords, folder: Path) -> None:
    events = json.loads((folder / "chrome_trace.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {f"request {record.request_id}" for record in records.requests} < tracks
    steps = [event for event in events if event["ph"] == "X" and event["name"].startswith("step ")]
    assert len(steps) == len(records.steps)
    for before, after in pairwise(steps):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    index, record = next(
        (index, record) for index, record in enumerate(records.requests) if record.request_num_decode_tokens > 1
    )
    decode = next(event for event in events if event["name"] == "decode" and event["tid"] == index)
    assert decode["dur"] == pytest.approx(1e6 * (record.finished_at_s - record.first_token_at_s))
    assert {"attn_decode", "mapped bytes"} <= {event["name"] for event in events}
    (mapping,) = [event for event in events if event["name"].startswith("map pages")]
    first, second = records.memory
    assert mapping["dur"] == pytest.approx(1e6 * (second.at_s - first.at_s)) and mapping["args"] == {"mapping_ms": 250}


def test_schedule_has_one_line_a_step(records: RunRecords, folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "schedule.jsonl").read_text().splitlines()]
    assert [sum(chunk[2] for chunk in line["chunks"]) for line in lines] == [step.num_tokens for step in records.steps]


def test_pages_and_mapping_time_are_differences() -> None:
    clock = Clock()
    store = MetricsStore(clock, page_bytes=1024)
    for mapped, driver_s, waited in ((2048, 1.0, 1), (5120, 1.5, 3)):
        clock.now_s += 1
        store.on_memory(MemoryStats(mapped_bytes=mapped, driver_s=driver_s, steps_waited=waited))
    first, second = memory_table(store.records()).records
    assert (first["kv_pages_mapped"], second["kv_pages_mapped"]) == (2, 5)
    assert (first["kv_mapping_time"], second["kv_mapping_time"]) == (0, 0.5)
    assert second["kv_steps_waited"] == 2


def test_report_of_nothing_is_written(tmp_path: Path) -> None:
    summary = write_report(MetricsStore(Clock()).records(), tmp_path, ReportOptions())
    assert (summary["num_requests"], summary["throughput"]["tokens_per_s"]) == (0, 0.0)


def test_a_report_is_removed_and_nothing_else(records: RunRecords, tmp_path: Path) -> None:
    own = [tmp_path / "notes.csv", plots_folder(tmp_path) / "mine.png"]
    options = ReportOptions(operations=True, cpu_operations=True)
    write_report(records, tmp_path, options)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} >= {*FILES} - {"schedule.jsonl"}
    for path in own:
        path.write_text("mine")
    remove_report(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == own
    remove_report(tmp_path / "nowhere")


class Killed(BaseException):
    """The process ends here: no clean-up runs after it."""


def kill_at(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Every change of a folder from call `number` on raises; returns the list whose only entry counts the calls."""
    calls = [0]

    def fragile(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] > number:
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(owner, name, call)

    for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "mkdir"), (files, "open")):
        fragile(owner, name)
    return calls


def test_a_kill_at_any_point_leaves_no_summary_of_missing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report replaces one with other files; whatever a kill leaves is removed by the next run."""
    monkeypatch.setattr(files, "open", open, raising=False)
    monkeypatch.setattr(report, "environment", dict)
    operations = [OperationRecord("attn", step, 0, None, 0.1, True) for step in range(2)]
    records = replace(long_run(2), operations=tuple(operations))
    few = {name: values for name, values in report.distributions(records).items() if "attn" in name or "size" in name}
    monkeypatch.setattr(report, "distributions", lambda records: few)
    old, new = ReportOptions(operations=True, plots=False), ReportOptions(cpu_operations=True, plots=False)

    def replace_report(folder: Path) -> None:
        remove_report(folder)
        write_report(records, folder, new, {"ended": "new"})

    def listing(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    complete = {}
    for name, options in (("old", old), ("new", new)):
        write_report(records, tmp_path / name, options)
        complete[name] = listing(tmp_path / name)
    write_report(records, tmp_path / "copied", old, {"ended": "old"})
    with monkeypatch.context() as patch:
        num_calls = kill_at(patch, sys.maxsize)
        replace_report(tmp_path / "old")
    assert listing(tmp_path / "old") == complete["new"] and num_calls[0] > 50
    for number in range(num_calls[0]):
        folder = shutil.copytree(tmp_path / "copied", tmp_path / str(number))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, number)
            replace_report(folder)
        if (folder / "summary.json").exists():
            ended = json.loads((folder / "summary.json").read_text())["ended"]
            assert listing(folder) >= complete[ended], number
        replace_report(folder)
        assert listing(folder) == complete["new"], number


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/b", "a\\b", ""])
def test_names_in_a_summary_remove_nothing_outside_the_report(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a" / "b"
    (plots_folder(folder)).mkdir(parents=True)
    absolute = tmp_path / "absolute"
    victims = [
        tmp_path / "x.csv",
        tmp_path / "a" / "x.png",
        plots_folder(folder) / "mine.csv",
        tmp_path / "absolute.csv",
    ]
    for path in victims:
        path.write_text("mine")
    metrics = {name: {}, str(absolute): {}, "..\0": {}, "listed": {}}
    (plots_folder(folder) / "listed.csv").write_text("")
    (folder / "summary.json").write_text(json.dumps({"metrics": metrics}))
    remove_report(folder)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(victims)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"metrics": 5}', '{"metrics": [[1], {}]}', "\udcff", "[]"])
def test_a_broken_summary_is_removed(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    remove_report(tmp_path)
    assert not list(tmp_path.iterdir())


def long_run(num_requests: int) -> RunRecords:
    """Requests of one step and two tokens each."""
    requests = [
        RequestRecord(str(i), 3, i, None, i + 0.1, i + 0.5, "stop", 0.4, 1, 0, array("d", [i + 0.2, i + 0.5]))
        for i in range(num_requests)
    ]
    steps = [StepRecord(i, 0, StepTimes(i, i + 0.1, i + 0.4, i + 0.5), i, 1, 3, 0, 0, 0.2) for i in range(num_requests)]
    return RunRecords(0.0, float(num_requests), tuple(requests), tuple(steps))


def test_the_trace_is_linear_in_the_run() -> None:
    """Counted in lines of Python run, which no busy machine can disturb."""

    def num_lines(num_requests: int) -> int:
        records, count = long_run(num_requests), 0

        def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            events = list(trace_events(records))
        finally:
            sys.settrace(before)
        assert len(events) == pytest.approx(num_trace_events(records), abs=10)
        return count

    assert num_lines(400) < 2.1 * num_lines(200)


def test_a_large_trace_has_to_be_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_TRACE_EVENTS", 1000)
    large, small = long_run(200), long_run(10)
    for name, records, wanted in (("large", large, None), ("small", small, None), ("asked", large, True)):
        options = ReportOptions(plots=False, individual_batches=False, chrome_trace=wanted)
        write_report(records, tmp_path / name, options)
        assert (tmp_path / name / "chrome_trace.json").exists() == (name != "large")
    assert len(json.loads((tmp_path / "asked" / "chrome_trace.json").read_text())["traceEvents"]) > 1000
    assert "chrome_trace.json is not written: it would have about 1800 events, and more than 1000" in caplog.text


def test_an_interrupt_ends_the_trace_and_leaves_no_part_of_it(tmp_path: Path) -> None:
    """In a process of its own, which gets SIGINT while it writes a trace of ten million events."""
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
from test_report import long_run
from sarathi.metrics.report import ReportOptions, _write_trace
from dataclasses import replace
records = long_run(1)
_write_trace(replace(records, steps=records.steps * 2_000_000), Path({str(tmp_path)!r}), True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in error and not list(tmp_path.iterdir())


def test_report_of_merged_replicas(tmp_path: Path) -> None:
    parts = [run("sarathi", SEED + replica, replica=replica).store.records() for replica in range(2)]
    write_report(merge(parts), tmp_path, ReportOptions(plots=False))
    table = pd.read_csv(tmp_path / TABLES_FOLDER / "sequence_metrics.csv", index_col="Request Id")
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
