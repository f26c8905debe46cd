"""Files of a run beside those of an older one in the same folder, and what ends a run outside its loop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sarathi.benchmark import main as main_module
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.main import run_configs
from sarathi.benchmark.outcome import COMPLETED, RunOutcome
from sarathi.benchmark.results import write_results
from sarathi.metrics import RunRecords
from sarathi.metrics.wandb_log import WandbError

OUTCOME = RunOutcome(COMPLETED, 1.0, 1, {}, [{"request_id": "0", "token_ids": [1]}], RunRecords(0.0, 1.0))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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
    assert names(tmp_path) == {"config.yml", "summary.json", "plots"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"ended", "run_s", "config", "environment"} <= set(summary)


def test_an_interrupt_before_there_is_a_result_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(configs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "run_all", interrupt)
    assert run_configs(lambda: [parse_options([f"--output_dir={tmp_path}"])]) == 130
    assert capsys.readouterr().err == "benchmark: interrupted before there was a result\n"


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
