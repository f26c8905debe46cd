"""Every experiment in its --test form on the CPU with the small model: files, columns, repetition, failures."""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from http_server import wait_until
from process_tree import stopped
from processes import ROOT, check_run, environment, script

pytestmark = pytest.mark.bench


def schedule(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "schedule.jsonl").read_text().splitlines()]


def test_static_trace_repeats_its_schedule_and_resumes(tmp_path: Path) -> None:
    words = ["--test", "--backends", "sdpa_vattn", "--", "--write_json_trace"]
    script("benchmark_e2e_static_trace.py", "--output", tmp_path / "a", *words)
    script("benchmark_e2e_static_trace.py", "--output", tmp_path / "b", *words)
    first, second = (next((tmp_path / name).glob("smollm2*")) for name in "ab")
    check_run(first)
    assert schedule(first) == schedule(second) and len(schedule(first)) > 5
    again = script("benchmark_e2e_static_trace.py", "--resume", "--output", tmp_path / "a", *words)
    assert "done before" in again.stdout
    processed = script("process_e2e_static.py", tmp_path / "a")
    assert script("process_experiment.py", "e2e_static", tmp_path / "a").stdout == processed.stdout
    table = pd.read_csv(tmp_path / "a" / "makespan.csv")
    assert list(table["backend"]) == ["sdpa_vattn"] and (table["makespan_s"] > 0).all()
    assert "makespan_s" in processed.stdout and (tmp_path / "a" / "makespan.png").is_file()


def processes_that_name(text: str) -> list[int]:
    """Ids of processes with this text on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if text in path.read_text():
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_experiment_that_is_ended_leaves_no_process_behind(number: signal.Signals, tmp_path: Path) -> None:
    words = ["e2e_static_brief", "--test", "--output", str(tmp_path)]
    run = [sys.executable, str(ROOT / "scripts" / "benchmark_experiment.py"), *words]
    process = subprocess.Popen(run, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the first run is named before its process starts
    while len(processes_that_name(str(tmp_path))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    with stopped([process.pid]):
        refused = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True)
        process.send_signal(number)
    assert refused.returncode == 1 and " is in use: another process writes its results there" in refused.stderr
    process.communicate(timeout=240)
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    wait_until(lambda: not processes_that_name(str(tmp_path)), "processes are left")
    assert "runs are complete" in script("benchmark_experiment.py", *words, "--resume").stdout


def test_dynamic_trace_has_a_latency_for_each_load(tmp_path: Path) -> None:
    script("benchmark_e2e_dynamic_trace.py", "--test", "--output", tmp_path)
    script("process_e2e_dynamic.py", tmp_path)
    table = pd.read_csv(tmp_path / "latency.csv")
    assert sorted(table["qps"]) == [4, 8]
    assert (table["p50"] <= table["p90"]).all() and (table["p90"] <= table["p99"]).all()
    assert (tmp_path / "latency.png").is_file()
    for folder in tmp_path.glob("smollm2*"):
        check_run(folder)


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("prefill_throughput", "prefill", "prefill_tokens_per_s"),
        ("decode_throughput", "decode", "decode_tokens_per_s"),
        ("e2e_static_brief", "makespan", "ratio"),
        ("offline_long", "makespan", "makespan_s"),
        ("online_long", "latency", "p50"),
        ("sarathi_claim", "between_tokens", "tbt_p99"),
        ("sync_async", "decode_steps", "p99_ms"),
    ],
)
def test_each_figure_has_its_table_and_plot(name: str, table: str, column: str, tmp_path: Path) -> None:
    script("benchmark_experiment.py", name, "--test", "--output", tmp_path)
    rows = pd.read_csv(tmp_path / f"{table}.csv")
    assert (rows[column] > 0).all()
    assert list(tmp_path.glob("*.png"))
    assert len(rows) == len(list(tmp_path.glob("smollm2*")))


def test_a_failed_run_is_told_at_the_end_and_in_the_exit_code(tmp_path: Path) -> None:
    """FlashAttention has no CPU kernel; the other run still happens."""
    words = ["--test", "--backends", "fa_vattn", "sdpa_vattn", "--output", tmp_path]
    done = script("benchmark_e2e_static_trace.py", *words, code=1)
    assert "1 of 2 runs are complete" in done.stdout
    assert "fa_vattn_pd8_c64 failed" in done.stderr and "runs on cuda, not on cpu" in done.stderr
