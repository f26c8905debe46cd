"""The benchmark's command lines and example on the CPU with the small model: files, columns, interrupts. Not speed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from process_tree import children
from processes import ROOT, check_run, command, environment

from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.run.runner import BenchmarkRunner
from sarathi.engine.llm_engine import LLMEngine
from sarathi.engine.outputs import RequestOutput
from sarathi.metrics.report import TABLES_FOLDER

pytestmark = pytest.mark.bench

LENGTHS = "--uniform_request_length_generator"
SMALL = [
    *(
        "--model.device=cpu",
        "--kv_cache_bytes=256mb",
        "--max_model_len=512",
        "--show_progress=false",
        "--time_limit=120",
    ),
    "--length_provider=uniform",
    *(f"{LENGTHS}.min_tokens=30", f"{LENGTHS}.max_tokens=90", f"{LENGTHS}.prefill_to_decode_ratio=6"),
    "--metrics_store.write_plots=false",
]
RUN = [sys.executable, "-m", "sarathi.benchmark.main", *SMALL]


def read_until(process: subprocess.Popen[str], *shown: str) -> None:
    """Returns when the process has shown all of these patterns on its stderr, in any order."""
    assert process.stderr is not None
    said = ""
    while not all(re.search(each, said) for each in shown):
        more = os.read(process.stderr.fileno(), 65536).decode(errors="replace")
        assert more, f"the process ended, and said: {said}"
        said += more


def test_replicas_share_the_requests_and_merge(tmp_path: Path) -> None:
    command(*RUN, "--num_replicas", 2, "--num_requests", 5, "--output_dir", tmp_path)
    summary = check_run(tmp_path)
    ids = pd.read_csv(tmp_path / TABLES_FOLDER / "sequence_metrics.csv")["Request Id"]
    assert sorted(ids) == ["0_0", "0_2", "0_4", "1_1", "1_3"]
    assert summary["num_completed"] == 5


def test_a_replica_that_dies_is_told_and_its_requests_are_counted(tmp_path: Path) -> None:
    lengths = tmp_path / "trace.csv"
    lengths.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,2,2\n0,2,3000\n" + "0,2,2\n" * 7)
    words = ["--num_replicas", "2", "--request_generator.provider", "trace", "--max_model_len", "4000"]
    words += ["--trace_request_generator.trace_file", str(lengths), "--output_dir", str(tmp_path / "out")]
    words += ["--num_warmup_requests", "0", "--show_progress", "true"]
    process = subprocess.Popen([*RUN, *words], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    read_until(process, "replica 0: 100%")  # the other has a request of 3,000 tokens
    newest = [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()][-1]
    os.kill(newest, signal.SIGKILL)  # replica 0 may have ended
    _, said = process.communicate(timeout=240)
    assert process.returncode == 2 and "replica 1 ended without a result; 4 requests are lost" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["ended"], summary["num_finished"], summary["num_lost"]) == ("a replica died", 5, 4)


def test_a_tensor_parallel_degree_makes_ranks_of_each_replica(tmp_path: Path) -> None:
    command(*RUN, "--model_tensor_parallel_degree", 3, "--num_requests", 3, "--output_dir", tmp_path / "3")
    assert check_run(tmp_path / "3")["num_completed"] == 3
    done = command(*RUN, "--model_tensor_parallel_degree", 2, "--output_dir", tmp_path / "2", code=1)
    assert "possible are 1, 3" in done.stderr
    timed = ("--model_tensor_parallel_degree", 3, "--enable_op_level_metrics")
    done = command(*RUN, *timed, "--output_dir", tmp_path / "timed", code=1)
    assert "enable_op_level_metrics is true: it needs one rank" in done.stderr


def test_profile_plots_trace_and_operations(tmp_path: Path) -> None:
    words = ["--enable_profiling", "--profiling.start_step=2", "--profiling.num_steps=2", "--num_requests=3"]
    words += [
        "--enable_cpu_op_level_metrics",
        "--enable_op_level_metrics",
        "--enable_request_outputs",
        "--metrics_store.write_plots=true",
    ]
    command(*RUN, *words, "--output_dir", tmp_path)
    check_run(tmp_path)
    assert json.loads((tmp_path / "profile_0.json").read_text())["traceEvents"]
    assert json.loads((tmp_path / "chrome_trace.json").read_text())["traceEvents"]
    answers = json.loads((tmp_path / "responses.json").read_text())
    requests = pd.read_csv(tmp_path / TABLES_FOLDER / "sequence_metrics.csv").set_index("Request Id")[
        "request_num_decode_tokens"
    ]
    assert {f"0_{name}": len(answer["token_ids"]) for name, answer in answers.items()} == requests.to_dict()
    cpu = pd.read_csv(tmp_path / TABLES_FOLDER / "cpu_operation_metrics.csv")
    assert (cpu[["schedule", "model_execution_e2e", "prepare_inputs", "sample"]] > 0).all().all()
    operations = pd.read_csv(tmp_path / TABLES_FOLDER / "operation_metrics.csv")
    always = ["attn_rope", "attn_kv_cache_save", "attn_post_proj", "mlp_up_proj", "mlp_activation", "lm_head_linear"]
    assert (operations[always] > 0).all().all()
    assert operations[["attn_prefill", "attn_decode"]].notna().any().all()
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_writes_what_there_is(number: signal.Signals, tmp_path: Path) -> None:
    words = [
        "--num_requests",
        "400",
        "--interval_provider",
        "poisson",
        "--poisson_request_interval_generator.qps",
        "20",
    ]
    process = subprocess.Popen(
        [*RUN, *words, "--output_dir", str(tmp_path), "--show_progress", "true"],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored in the background or under nohup
    )  # fmt: skip
    read_until(process, r" [1-9]\d*/400 ")  # the progress bar: requests have been answered
    process.send_signal(number)
    process.communicate(timeout=240)
    assert process.returncode == 130
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ended"] == "interrupted" and 0 < summary["num_requests"] < 400
    assert len(pd.read_csv(tmp_path / TABLES_FOLDER / "batch_metrics.csv")) > 0


def test_an_interrupt_of_the_warm_up_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = parse_options([*SMALL, "--num_requests=2", f"--output_dir={tmp_path}", "--model.device=CPU"])
    with BenchmarkRunner(config) as runner:
        step, calls = LLMEngine.step, []

        def interrupted(engine: LLMEngine) -> list[RequestOutput]:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return step(engine)

        monkeypatch.setattr(LLMEngine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(runner.workload())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_replica_that_is_done_keeps_its_result_through_an_interrupt(number: signal.Signals, tmp_path: Path) -> None:
    """The second replica has served its share and waits, with more than a pipe holds, for the first when ^C comes."""
    lengths = tmp_path / "trace.csv"
    lengths.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,2,3000\n" + "0,2,2\n" * 799)
    words = ["--num_replicas", "2", "--request_generator.provider", "trace", "--max_model_len", "4000"]
    words += ["--trace_request_generator.trace_file", str(lengths), "--output_dir", str(tmp_path / "out")]
    words += ["--num_warmup_requests", "0", "--enable_request_outputs", "--show_progress", "true"]
    process = subprocess.Popen(
        [*RUN, *words], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    read_until(process, "replica 1: 100%", "replica 0: .* 399/400 ")  # the first has ended its short requests too
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)  # as `kill` sends it: to the command alone
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130, said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["ended"], summary["num_requests"], summary["num_finished"]) == ("interrupted", 800, 799)


def test_capacity_search_finds_a_rate_and_resumes(tmp_path: Path) -> None:
    words = [
        "-m",
        "sarathi.benchmark.capacity.main",
        *SMALL,
        "--interval_provider",
        "poisson",
        "--num_requests",
        4,
    ]
    words += [
        "--scheduling-delay-slo-value=60",
        "--tbt-slo-value",
        60,
        "--capacity_search.start_qps",
        8,
        "--max_probes",
        2,
        "--completed_share=0.01",  # four requests end long after the last has come
        "--output_dir",
        tmp_path,
    ]
    done = command(sys.executable, *words)
    assert "capacity at least " in done.stdout and "asked for 16.000; no rate" in done.stdout
    assert len(pd.read_csv(tmp_path / "capacity.csv")) == 2 and (tmp_path / "capacity.png").is_file()
    assert command(sys.executable, *words).stdout == done.stdout
    assert len((tmp_path / "probes.jsonl").read_text().splitlines()) == 2


def test_the_example_compares_backends(tmp_path: Path) -> None:
    words = ["--backends", "sdpa_vattn", "sdpa_paged_16", "--output", tmp_path]
    done = command(sys.executable, ROOT / "examples" / "compare_backends.py", *words)
    assert "sdpa_vattn " in done.stdout and "sdpa_paged_16" in done.stdout
    assert (tmp_path / "time_between_tokens.png").is_file()


def test_the_command_line_runs_benchmarks(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sarathi.entrypoints.cli", "bench", "run", *SMALL, "--num_requests", 2]
    command(*words, "--output_dir", tmp_path)
    check_run(tmp_path)
