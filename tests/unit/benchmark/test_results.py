"""Files of a run beside those of an older one in the same folder, and what ends a run outside its loop."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sarathi.benchmark import main as main_module
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.main import run_configs
from sarathi.benchmark.results import in_own_folder, write_results
from sarathi.benchmark.run.outcome import COMPLETED, RunOutcome
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.messages import Chunk, SampledToken, SchedulerOutput, StepResult
from sarathi.metrics import MetricsStore, RunRecords
from sarathi.metrics.records import StepTimes
from sarathi.metrics.wandb_log import WandbError

OUTCOME = RunOutcome(COMPLETED, 1.0, 1, {}, [{"request_id": "0", "token_ids": [1]}], RunRecords(0.0, 1.0))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.parent.name != "plots"}


def run_of_one_request() -> RunRecords:
    """Five prompt tokens and three of output, a second each."""
    clock = itertools.count()
    store = MetricsStore(lambda: float(next(clock)))
    store.on_request_arrived("0", 5, 1.0)
    for step in range(3):
        chunk = Chunk("0", 5 * (step > 0) + max(step - 1, 0), 1 if step else 5, True, 8, ())
        times = StepTimes(*(2.0 + step + part / 4 for part in range(4)))
        token = SampledToken("0", 7)
        store.on_step(SchedulerOutput(step, (), (chunk,), (), ()), StepResult(step, (token,), 0.1), times)
    store.on_request_finished("0", "length")
    return store.records()


def test_no_file_of_an_older_run_passes_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "profile_1.json").write_text("{}")
    rich = ["--enable_op_level_metrics", "--enable_cpu_op_level_metrics", "--enable_profiling"]
    write_results(parse_options([*rich, f"--output_dir={tmp_path}"]), [OUTCOME])
    before = names(tmp_path)
    assert {"operation_metrics.csv", "chrome_trace.json", "responses.json", "profile_1.json"} < before
    plain = parse_options(["--write_chrome_trace=false", f"--output_dir={tmp_path}"])
    write_results(plain, [replace(OUTCOME, responses=[])])
    assert before - names(tmp_path) == {
        *("operation_metrics.csv", "cpu_operation_metrics.csv", "chrome_trace.json", "responses.json", "profile_1.json")
    }
    write_results(plain, [replace(OUTCOME, records=None, responses=[])])
    assert names(tmp_path) == {"config.yml", "summary.json", "plots", "benchmark_config.yml", "replica_0"}
    assert {path.name for path in (tmp_path / "replica_0").rglob("*.*")} == {"config.yml"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"ended", "run_s", "config", "environment"} <= set(summary)


def test_files_where_the_originals_notebooks_look(tmp_path: Path) -> None:
    """Paths, keys and columns are those that their plot scripts read."""
    requests = ((0, RequestSpec(0.0, 5, 3)), (1, RequestSpec(0.5, 9, 4)))
    outcome = replace(OUTCOME, records=run_of_one_request(), requests=requests)
    words = ["--replica_scheduler_provider=sarathi", "--sarathi_scheduler_chunk_size=96", "--write_json_trace"]
    write_results(parse_options([*words, f"--output_dir={tmp_path}"]), [outcome])
    flat = yaml.safe_load((tmp_path / "benchmark_config.yml").read_text())
    assert (flat["replica_scheduler_provider"], flat["sarathi_scheduler_chunk_size"]) == ("sarathi", 96)
    engine = yaml.safe_load((tmp_path / "replica_0" / "config.yml").read_text())
    assert (engine["scheduler_type"], engine["chunk_size"]) == ("sarathi", 96)
    plots = tmp_path / "replica_0" / "plots"
    series = pd.read_csv(plots / "decode_completion_time_series.csv")
    assert series.columns.tolist() == ["Time (sec)", "decode_completion"] and series.decode_completion.tolist() == [
        1,
        2,
        3,
    ]
    name = "decode_token_execution_plus_preemption_time"
    assert pd.read_csv(plots / f"{name}.csv")[name].tolist() == [1.0, 1.0]
    assert pd.read_csv(plots / f"{name}_list.csv")[f"{name}_list"].tolist() == [1.0, 1.0]
    assert "batch_num_prefill_tokens" in pd.read_csv(tmp_path / "replica_0" / "batch_metrics.csv")
    assert "request_e2e_time" in pd.read_csv(tmp_path / "replica_0" / "sequence_metrics.csv")
    assert json.loads((tmp_path / "requests.json").read_text())[1] == {
        "id": 1, "arrived_at": 0.5, "num_prefill_tokens": 9, "num_decode_tokens": 4,
    }  # fmt: skip


def test_scripts_that_walk_through_folders_find_each_table_once_and_the_runs_name_before_it(tmp_path: Path) -> None:
    """vAttention's scripts of figures 4 to 9 use os.walk, which enters no links, and parts of the path."""
    run = tmp_path / "figure_4" / "model_yi-6b_bs_64"
    write_results(parse_options([f"--output_dir={run}"]), [replace(OUTCOME, records=run_of_one_request())])
    found = [Path(folder) / name for folder, _, files in os.walk(tmp_path) for name in files]
    for name in ("batch_metrics.csv", "sequence_metrics.csv", "prefill_time_execution_plus_preemption.csv"):
        (path,) = (str(path) for path in found if path.name == name)
        assert path[path.find("_bs_") + 4 : path.find("/replica_0")] == "64"


def test_runs_that_share_an_output_dir(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = parse_options([f"--output_dir={tmp_path}", "--timestamped_output"])
    folders = {in_own_folder(first).output_dir for _ in range(2)}
    assert len(folders) == 2 and {Path(folder).parent for folder in folders} == {tmp_path}
    assert replace(in_own_folder(first), output_dir=str(tmp_path)) == first
    plain = parse_options([f"--output_dir={tmp_path}"])
    write_results(plain, [OUTCOME])
    assert in_own_folder(plain) == plain and "another configuration" not in caplog.text
    in_own_folder(parse_options([f"--output_dir={tmp_path}", "--seed=9"]))
    assert "holds results of another configuration, which this run replaces" in caplog.text


def test_an_interrupt_before_there_is_a_result_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(configs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "run_all", interrupt)
    assert run_configs(lambda: [parse_options([f"--output_dir={tmp_path}"])]) == 130
    assert capsys.readouterr().err == "benchmark: interrupted\n"


def test_a_result_that_cannot_be_sent_ends_no_other_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise WandbError("no key")

    monkeypatch.setattr("sarathi.benchmark.results.log_report", refuse)
    monkeypatch.setattr(main_module, "run_all", lambda configs: ([OUTCOME] for _ in configs))
    runs = [parse_options(["--wandb_project=p", f"--output_dir={tmp_path / name}"]) for name in ("a", "b")]
    assert run_configs(lambda: runs) == 1
    assert capsys.readouterr().err.count("benchmark: no key") == 2
    assert all((tmp_path / name / "summary.json").is_file() for name in ("a", "b"))
