"""Grids, resuming, failures and tables, over results written by hand: no model, no process but small ones."""

import json
import signal
import subprocess
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from sarathi.benchmark.config.options import as_words, parse_options
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.experiment import execute as execute_module
from sarathi.benchmark.experiment.collect import collect
from sarathi.benchmark.experiment.command import (
    process_experiment,
    process_named_experiment,
    run_experiment,
    run_named_experiment,
    script_of,
)
from sarathi.benchmark.experiment.execute import execute, groups, is_complete
from sarathi.benchmark.experiment.measures import budget
from sarathi.benchmark.experiment.plan import Run, read_experiment
from sarathi.benchmark.experiment.tables import (
    IDENTITY,
    TABLES,
    Score,
    TableKind,
    compared,
    make_table,
    rate_of,
    workload_name,
)
from sarathi.benchmark.results import read_config
from sarathi.config.knobs import ConfigError
from sarathi.config.load import to_dict
from sarathi.metrics.report import TABLES_FOLDER

HEAD = "output_dir: x\ntable: makespan\ngrid: "
FILES = sorted((Path(__file__).parents[3] / "experiments").glob("*.yml"))
EXPERIMENTS = [path for path in FILES if script_of(path) is None]
GRID = """
output_dir: {folder}
table: makespan
base: {{seed: 3, replica_scheduler.provider: vllm}}
grid:
  model.name: [a, b/c]
  size:
    small: {{replica_scheduler.max_batch_size: 1, model.max_model_len: 100}}
    large: {{replica_scheduler.max_batch_size: 9}}
test: {{base: {{seed: 4}}, grid: {{model.name: [t]}}}}
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yml"
    path.write_text(GRID.format(folder=tmp_path / "out"))
    return path


class FakeSessions:
    """In place of processes: each serves its folders until one whose model is named `dies`, `cut` ends unwell."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, places: list[Path], log: Path) -> int:
        self.calls.append([place.name for place in places])
        log.write_text("line 1\n" * 9 + "line 2\nfell over")
        for place in places:
            config = read_config(place)
            if config.replica_scheduler.max_batch_size == 1 and config.model.name == "a":
                return 1
            ended = "time limit" if config.model.name == "cut" else "completed"
            summary = {"ended": ended, "refused": {}, "num_requests": 4, "num_completed": 4, "duration_s": 9.0}
            summary["metrics"] = {}
            (place / "summary.json").write_text(json.dumps(summary))
        return 0


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> FakeSessions:
    fake = FakeSessions()
    monkeypatch.setattr(execute_module, "_run", fake)
    return fake


def test_runs_are_all_combinations(grid: Path) -> None:
    runs = read_experiment(grid).runs()
    assert [run.name for run in runs] == ["a_small", "a_large", "b-c_small", "b-c_large"]
    small = parse_options(as_words(runs[2].settings))
    assert (small.seed, small.model.name, small.replica_scheduler.max_batch_size, small.model.max_model_len) == (
        3,
        "b/c",
        1,
        100,
    )


def test_test_form_replaces_axes_and_knobs(grid: Path) -> None:
    experiment = read_experiment(grid, test=True)
    assert [run.name for run in experiment.runs()] == ["t_small", "t_large"]
    assert experiment.runs()[0].settings["seed"] == 4
    assert experiment.output_dir == "results/test/grid"


def test_axes_can_be_cut_and_given_new_values_where_they_are_knobs(grid: Path) -> None:
    experiment = read_experiment(grid)
    assert [run.name for run in experiment.with_axis("size", ["large"]).with_axis("model.name", ["x"]).runs()] == [
        "x_large"
    ]
    given = experiment.with_base({"seed": "7", "max_batch_size": "5"}).runs()
    assert [(run.settings["seed"], run.settings["replica_scheduler.max_batch_size"]) for run in given] == [(7, 5)] * 4
    with pytest.raises(ValueError, match=r"model\.name is an axis of this experiment: give its values as --axis"):
        experiment.with_base({"model_name": "x"})
    with pytest.raises(ValueError, match="has no 'huge'; it has small, large"):
        experiment.with_axis("size", ["huge"])
    with pytest.raises(ValueError, match=r"nearest of model\.name, size is 'size'"):
        experiment.with_axis("sise", ["large"])


def test_labels_whose_knobs_are_all_given_for_all_runs_are_still_known(grid: Path) -> None:
    given = {"max_batch_size": "5", "max_model_len": "none"}
    (run,) = read_experiment(grid).with_base(given).with_axis("size", ["small"]).with_axis("model.name", ["a"]).runs()
    assert (run.name, run.settings["replica_scheduler.max_batch_size"]) == ("a_small", 5)


ROWS_KNOB = "metrics_store.keep_individual_batch_metrics"
READERS_OF_ROWS = ("prefill", "decode", "decode_steps", "between_tokens")


@pytest.mark.parametrize(
    ("table", "knob"),
    [*((table, "write_metrics") for table in TABLES), *((table, ROWS_KNOB) for table in READERS_OF_ROWS)],
)
def test_runs_that_would_not_write_what_their_table_reads_are_refused_before_any(
    table: str, knob: str, grid: Path, sessions: FakeSessions, capsys: pytest.CaptureFixture[str]
) -> None:
    grid.write_text(grid.read_text().replace("makespan", table))
    assert run_experiment(grid, "", ["--", f"--{knob}", "no"]) == 1
    assert f"{knob} is False: it must be true, the table {table!r}" in capsys.readouterr().err
    assert sessions.calls == []


def test_a_table_of_the_summary_needs_no_rows(grid: Path) -> None:
    assert len(read_experiment(grid).with_base({ROWS_KNOB: "no"}).runs()) == 4


@pytest.mark.parametrize("kind", TABLES.values(), ids=TABLES)
def test_what_a_table_needs_is_on_by_default(kind: TableKind) -> None:
    defaults = parse_options([])
    assert all(attrgetter(name)(defaults) is True for name in kind.needs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds None: an experiment is a mapping of output_dir, table, base, grid, test"),
        ("[a]", r"holds \['a'\]: an experiment is a mapping"),
        ("output_dir: x", "'table' is missing; it must be one of makespan, latency"),
        ("table: makespan", "'output_dir' is missing"),
        ("output_dir: x\ntable: makespam", "table is 'makespam': it must be one of .*; the nearest is 'makespan'"),
        ("output_dir: x\ntable: [", "is not YAML"),
        ("output_dir: x\ntable: makespan\ngird: {}", "'gird' is unknown; an experiment has output_dir"),
        ("output_dir: x\ntable: makespan\ngrid: [1]", r"grid is \[1\]: it must be a mapping"),
        ("output_dir: x\ntable: makespan\ntest: {base: 1}", "test.base is 1: it must be a mapping"),
        (
            f"{HEAD}{{model.name: llama}}",
            "axis 'model.name' is 'llama': it must be a non-empty list of values, or a mapping of",
        ),
        (f"{HEAD}{{seed: 3}}", "axis 'seed' is 3: it must be a non-empty list of values, or a mapping"),
        (f"{HEAD}{{seed: }}", "axis 'seed' is None: it must be a non-empty list of values"),
        (f"{HEAD}{{seed: []}}", r"axis 'seed' is \[\]: it must be a non-empty list of values"),
        (f"{HEAD}{{size: {{small: 3}}}}", "axis 'size': small is 3: it must be a mapping"),
        (f"{HEAD}{{sede: [3]}}", "unknown setting 'sede'"),
        (f"{HEAD}{{12: [3]}}", "unknown setting 12: a setting's name is text"),
        (f"{HEAD}{{seed: [3]}}\nbase: {{null: 3}}", "unknown setting None: a setting's name is text"),
    ],
)
def test_what_is_no_experiment_is_told_before_any_run(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], sessions: FakeSessions
) -> None:
    path = tmp_path / "wrong.yml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"{path}.*{message}"):
        read_experiment(path)
    assert run_experiment(path, "", []) == process_experiment(path, "", []) == 1
    assert sessions.calls == [] and str(path) in capsys.readouterr().err


def test_runs_do_not_share_a_folder(grid: Path) -> None:
    with pytest.raises(ValueError, match="2 runs would share the folder 'b-c_small'"):
        read_experiment(grid).with_axis("model.name", ["b/c", "b-c"]).runs()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("test", [False, True])
def test_every_shipped_experiment_is_made_of_known_knobs(path: Path, test: bool) -> None:
    experiment = read_experiment(path, test)
    assert experiment.table in TABLES
    runs = experiment.runs()
    assert len({run.name for run in runs}) == len(runs) > 0
    for run in (runs[0], runs[-1]):
        parse_options(as_words(run.settings))


def write_result(place: Path, settings: dict, ended: str = "completed", **metrics: dict) -> None:
    place.mkdir(parents=True)
    config = parse_options(as_words({**settings, "output_dir": str(place)}))
    (place / "config.yml").write_text(yaml.safe_dump(to_dict(config)))
    summary = {"ended": ended, "refused": {}, "num_requests": 4, "num_completed": 4, "duration_s": 9.0}
    summary["metrics"] = metrics
    (place / "summary.json").write_text(json.dumps(summary))


def test_tables_read_what_a_run_was_from_its_configuration_not_from_its_folder(tmp_path: Path) -> None:
    settings = {
        "model.name": "yi",
        "attention_backend": "FA_VATTN_SYNC",
        "length_provider": "uniform",
        "uniform_request_length_generator.max_tokens": 5000,
    }
    write_result(tmp_path / "model_llama_attn_fi", settings, request_e2e_time={"max": 12.0})
    row = made("makespan", tmp_path).iloc[0]
    assert (row["model"], row["backend"], row["workload"]) == ("yi", "fa_vattn_sync", "1024-5000 tokens, P:D 20")
    assert (row["makespan_s"], row["requests_per_minute"]) == (12.0, 20.0)


def test_incomplete_runs_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], grid: Path) -> None:
    write_result(tmp_path / "out" / "good", {"seed": 1}, request_e2e_time={"max": 2.0})
    (tmp_path / "out" / "good" / "replica_0").mkdir()
    (tmp_path / "out" / "good" / "replica_0" / "config.yml").write_text("model: of the original's names")
    write_result(tmp_path / "out" / "cut", {"seed": 1}, ended="time limit", request_e2e_time={"max": 1.0})
    (tmp_path / "out" / "crashed").mkdir()
    (tmp_path / "out" / "crashed" / "config.yml").write_text("seed: 1")
    write_result(tmp_path / "out" / "unmeasured", {"write_metrics": False})
    for name, content in (("unmeasured", '{"ended": "completed", "refused": {}}'), ("list", "[1]"), ("empty", "")):
        (tmp_path / "out" / name).mkdir(exist_ok=True)
        (tmp_path / "out" / name / "summary.json").write_text(content)
    assert process_experiment(grid, "", [str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.count("incomplete, left out") == 5
    assert json.loads((tmp_path / "out" / "environment.json").read_text()) == [{}]
    lines = (tmp_path / "out" / "makespan.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("model,backend,scheduler,workload,qps,num_requests,makespan_s")


def test_a_table_tells_every_environment_that_its_runs_had(tmp_path: Path, grid: Path) -> None:
    revisions = ({"git": "old"}, {"git": "new"}, {"git": "old"})
    for name, revision in zip("abc", revisions, strict=True):
        write_result(tmp_path / "out" / name, {}, request_e2e_time={"max": 2.0})
        path = tmp_path / "out" / name / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "environment": revision}))
    assert process_experiment(grid, "", []) == 0
    assert json.loads((tmp_path / "out" / "environment.json").read_text()) == [{"git": "old"}, {"git": "new"}]


def config_of(place: Path, **settings: object) -> BenchmarkConfig:
    return parse_options(as_words({**settings, "output_dir": str(place)}))


def test_only_a_complete_result_of_the_same_settings_counts(tmp_path: Path) -> None:
    place = tmp_path / "run"
    assert not is_complete(config_of(place, seed=5))
    write_result(place, {"seed": 5})
    assert is_complete(config_of(place, seed=5))
    (place.parent / "x").mkdir()
    assert is_complete(config_of(place.parent / "x" / ".." / "run", seed=5))
    assert not is_complete(config_of(place, seed=6))
    (place / "summary.json").write_text('{"ended": "interrupted"}')
    assert not is_complete(config_of(place, seed=5))


def test_runs_that_differ_in_their_requests_alone_share_an_engine(tmp_path: Path) -> None:
    rates = [config_of(tmp_path / str(qps), **{"poisson_request_interval_generator.qps": qps}) for qps in (1, 2)]
    other = config_of(tmp_path / "c", attention_backend="sdpa_paged_16")
    more = config_of(tmp_path / "d", num_requests=3)
    assert groups([rates[0], other, rates[1], more]) == [[*rates, more], [other]]


def test_failures_are_told_at_the_end_and_runs_go_on(tmp_path: Path, grid: Path, sessions: FakeSessions) -> None:
    runs = read_experiment(grid).runs()
    (failure,) = execute(runs, tmp_path / "out", resume=False)
    assert (failure.name, failure.exit_code) == ("a_small", 1) and failure.tail.endswith("line 1\nline 2\nfell over")
    assert sessions.calls == [["a_small"], ["a_large"], ["b-c_small"], ["b-c_large"]]
    assert [each.name for each in execute(runs, tmp_path / "out", resume=True)] == ["a_small"]
    assert sessions.calls[4:] == [["a_small"]]


def test_runs_behind_one_that_ended_their_process_get_another(tmp_path: Path, sessions: FakeSessions) -> None:
    shared = {"model.name": "cut", "replica_scheduler.max_batch_size": 1}
    runs = [Run(str(count), {**shared, "synthetic_request_generator.num_requests": count}) for count in (1, 2)]
    failures = execute(runs, tmp_path, resume=False)
    assert [failure.name for failure in failures] == ["1", "2"] and sessions.calls == [["1", "2"]]
    sessions.calls.clear()
    dying = [Run(run.name, {**run.settings, "model.name": "a"}) for run in runs]
    assert [failure.name for failure in execute(dying, tmp_path, resume=False)] == ["1", "2"]
    assert sessions.calls == [["1", "2"], ["2"]]


def test_backends_are_compared_with_the_best_paged_one_of_the_same_work() -> None:
    def row(backend: str, seconds: float | None, workload: str = "w") -> dict:
        return {**dict.fromkeys(IDENTITY), "backend": backend, "workload": workload, "s": seconds, "rate": seconds}

    rows = [row("fa_vattn", 8.0), row("fa_paged", 10.0), row("fi_paged_16", 12.0), row("fa_vattn", 5.0, "alone")]
    rows.append(row("sdpa_vattn", None))
    works = [row["workload"] for row in rows]
    times = compared(pd.DataFrame(rows), works, Score("s"))
    assert times["reference"].tolist() == ["fa_paged"] * 3 + [np.nan, "fa_paged"]
    assert times["ratio"].tolist() == pytest.approx([1.25, 1.0, 10 / 12, np.nan, np.nan], nan_ok=True)
    rates = compared(pd.DataFrame(rows), works, Score("rate", more_is_better=True))
    assert rates["ratio"].tolist()[:3] == pytest.approx([8 / 12, 10 / 12, 1.0])


@pytest.mark.parametrize(
    "other",
    [
        {"trace_request_generator.time_scale_factor": 2},
        {"gamma_request_interval_generator.cv": 3},
        {"replica_scheduler.max_batch_size": 7},
        {"seed": 5},
    ],
)
def test_work_is_the_same_only_where_all_of_it_is(other: dict, tmp_path: Path) -> None:
    """What differs shows in no column; the run in blocks did twice the work in twice the time."""
    both = {"interval_provider": "gamma", "enable_op_level_metrics": False}
    for backend, seconds in (("sdpa_paged_16", 10.0), ("sdpa_vattn", 5.0)):
        write_result(tmp_path / backend, {**both, "attention_backend": backend}, request_e2e_time={"max": seconds})
    settings = {**both, **other, "attention_backend": "sdpa_vattn"}
    write_result(tmp_path / "other", settings, request_e2e_time={"max": 20.0})
    ratios = made("makespan", tmp_path)["ratio"]
    assert ratios.isna().tolist() == [True, False, False] and ratios.tolist()[1:] == [1.0, 2.0]


def test_policies_are_compared_whatever_their_own_knobs(tmp_path: Path) -> None:
    gaps, scheduler = "decode_token_execution_plus_preemption_time", "replica_scheduler"
    sarathi = {f"{scheduler}.provider": "sarathi", "sarathi_scheduler.chunk_size": 64}
    policies = ({f"{scheduler}.provider": "vllm"}, sarathi)
    for number, settings in enumerate(policies):
        write_result(tmp_path / str(number), settings, **{gaps: {"p99": 4.0 / (1 + number)}})
    write_result(tmp_path / "2", {**policies[1], f"{scheduler}.max_batch_size": 3}, **{gaps: {"p99": 9.0}})
    ratios = made("between_tokens", tmp_path)["ratio"]
    assert ratios.tolist()[:2] == [1.0, 2.0] and ratios.isna().tolist() == [False, False, True]


def made(kind: str, folder: Path) -> pd.DataFrame:
    """The table of the runs in a folder."""
    return make_table(TABLES[kind], collect(folder)[0])


def test_lines_of_runs_are_named_by_what_differs(tmp_path: Path) -> None:
    both = {"model.name": "m", "attention_backend": "sdpa_vattn", "replica_scheduler.provider": "sarathi"}
    others = [
        {"replica_scheduler.provider": "vllm"},
        {"sarathi_scheduler.chunk_size": 64},
        {"target_step_time": 0.02},
        {"enable_dynamic_chunking_schedule": True},
    ]
    for number, other in enumerate(others):
        write_result(tmp_path / str(number), {**both, **other})
    assert made("between_tokens", tmp_path)["variant"].tolist() == [
        "vllm",
        "sarathi 64 tokens a step",
        "sarathi 0.02 s a step",
        "sarathi 2048 to 128 tokens a step",
    ]


def test_lines_over_a_column_are_named_by_what_differs_at_one_place(tmp_path: Path) -> None:
    both = {"model.name": "m", "attention_backend": "sdpa_vattn", "interval_provider": "poisson"}
    for provider in ("orca", "vllm"):
        for qps in (1, 2):
            settings = {"replica_scheduler.provider": provider, "poisson_request_interval_generator.qps": qps}
            write_result(tmp_path / f"{provider}{qps}", {**both, **settings}, request_e2e_time_normalized={"p50": qps})
    assert made("latency", tmp_path)["variant"].tolist() == ["orca", "orca", "vllm", "vllm"]


def test_bars_are_named_by_what_differs_among_them(tmp_path: Path) -> None:
    for backend, chunk in (("sdpa_vattn", 64), ("sdpa_vattn", 128), ("sdpa_paged_16", 64)):
        settings = {"attention_backend": backend, "sarathi_scheduler.chunk_size": chunk}
        write_result(tmp_path / f"{backend}{chunk}", settings, request_e2e_time={"max": chunk})
    found = made("makespan", tmp_path)
    assert found.set_index("backend")["variant"].to_list() == [f"{n} tokens a step" for n in (64, 128, 64)]
    assert found["makespan_s"].tolist() == [64, 128, 64]


def test_runs_are_named_by_the_knobs_that_no_word_tells(tmp_path: Path) -> None:
    others = [{}, {"seed": 7}, {"replica_scheduler.max_batch_size": 3}, {"model.max_model_len": 900}]
    for number, other in enumerate(others):
        settings = {"attention_backend": "sdpa_vattn", **other}
        write_result(tmp_path / str(number), settings, request_e2e_time={"max": number})
    default = parse_options([])
    knobs = [
        (default.model.max_model_len, default.seed, default.replica_scheduler.max_batch_size),
        (default.model.max_model_len, 7, default.replica_scheduler.max_batch_size),
        (default.model.max_model_len, default.seed, 3),
        (900, default.seed, default.replica_scheduler.max_batch_size),
    ]
    names = ["seed {1} max_model_len {0} max_batch_size {2}".format(*each) for each in knobs]
    assert made("makespan", tmp_path)["variant"].tolist() == names


def test_repeated_runs_are_named_by_their_folders(tmp_path: Path) -> None:
    for number in range(2):
        settings = {"attention_backend": "sdpa_vattn"}
        write_result(tmp_path / str(number) / "run", settings, request_e2e_time={"max": number})
    assert made("makespan", tmp_path)["variant"].tolist() == ["0/run", "1/run"]


def test_a_budget_that_is_not_fixed_is_no_number() -> None:
    assert budget(parse_options(["--sarathi_scheduler.chunk_size=64"])) == 64
    assert budget(parse_options(["--target_step_time=0.02"])) is None
    assert budget(parse_options(["--enable_dynamic_chunking_schedule"])) is None


def test_a_table_that_cannot_be_made_hides_no_failure(
    grid: Path, sessions: FakeSessions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The table `decode` needs batch_metrics.csv, which these runs do not have."""
    grid.write_text(grid.read_text().replace("makespan", "decode"))
    assert run_experiment(grid, "", []) == 1
    said = capsys.readouterr()
    assert "no table: " in said.err and "batch_metrics.csv" in said.err
    assert "a_small failed with exit code 1" in said.err and "3 of 4 runs are complete" in said.out
    assert process_experiment(grid, "", [str(tmp_path / "out")]) == 1
    assert "no table: " in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(
    grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(places: list[Path], log: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(execute_module, "_run", interrupt)
    assert run_experiment(grid, "", []) == 130
    assert "--resume goes on from here" in capsys.readouterr().err


def test_an_interrupt_of_the_command_alone_reaches_its_session(
    grid: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The session sleeps; waiting for it is interrupted once, as by `kill -INT` of the command."""
    sessions: list[subprocess.Popen[bytes]] = []

    class Session(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([command[0], "-c", "import time; time.sleep(600)"], **options)

        def wait(self, timeout: float | None = None) -> int:
            if self not in sessions:
                sessions.append(self)
                raise KeyboardInterrupt
            return super().wait(60)

    monkeypatch.setattr(subprocess, "Popen", Session)
    assert run_experiment(grid, "", []) == 130
    assert [each.returncode for each in sessions] == [-signal.SIGTERM]


def test_the_short_form_is_processed_where_it_was_written(
    grid: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_result(tmp_path / "results" / "test" / "grid" / "run", {}, request_e2e_time={"max": 2.0})
    assert process_experiment(grid, "", ["--test"]) == 0
    assert (tmp_path / "results" / "test" / "grid" / "makespan.csv").is_file()


def test_exit_code_says_that_a_run_failed(
    grid: Path, sessions: FakeSessions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_experiment(grid, "", ["--axis", "size=small"]) == 1
    said = capsys.readouterr()
    assert "a_small failed with exit code 1" in said.err and "1 of 2 runs are complete" in said.out


@pytest.mark.parametrize("words", [["b/c", "x"], ["b/c,x"]])
def test_models_are_a_list_with_spaces_or_commas(
    words: list[str], grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_experiment(grid, "", ["--list", "--model", *words]) == 0
    assert capsys.readouterr().out.split() == ["b-c_small", "b-c_large", "x_small", "x_large"]


def test_unknown_experiments_name_the_known_ones(
    tmp_path: Path, grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_named_experiment(tmp_path, "", ["grdi"]) == 1
    assert "there are grid" in capsys.readouterr().err
    assert run_named_experiment(tmp_path, "", ["grid", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["a_small", "a_large", "b-c_small", "b-c_large"]


def test_options_of_a_script_are_run_by_the_same_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "sizes.yml").write_text("program: sizes\nbase: {pages: [2mb]}")
    (tmp_path / "scripts" / "benchmark_sizes.py").write_text(
        "import pathlib, sys\npathlib.Path('said.txt').write_text(' '.join(sys.argv[1:]))\nsys.exit(3)"
    )
    assert run_named_experiment(tmp_path / "experiments", "", ["sizes", "--output", "x"]) == 3
    assert Path("said.txt").read_text() == f"--figure {tmp_path / 'experiments' / 'sizes.yml'} --output x"


@pytest.mark.parametrize("named", [run_named_experiment, process_named_experiment])
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_needs_no_experiment(
    named: Callable[..., int], word: str, grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named(grid.parent, "what it does", [word]) == 0
    said = capsys.readouterr().out
    assert " NAME [-h]" in said and "what it does" in said and "NAME: grid" in said and "--test" in said


def test_memory_that_decodes_ask_for_is_told_a_second(tmp_path: Path) -> None:
    """Two slots: step 0 is a prefill, steps 1 to 3 decode both, in step 4 one of them has ended."""
    write_result(tmp_path / "run", {"replica_scheduler.max_batch_size": 2}, request_e2e_time={"max": 2.0})
    steps = [(0, 8, 0, 9.0), (1, 2, 2, 0.5), (2, 2, 2, 0.25), (3, 2, 2, 0.25), (4, 1, 1, 9.0)]
    header = "Batch Id,batch_num_tokens,batch_num_decode_tokens,batch_execution_time"
    lines = [header, *(",".join(map(str, step)) for step in steps)]
    (tmp_path / "run" / TABLES_FOLDER).mkdir()
    (tmp_path / "run" / TABLES_FOLDER / "batch_metrics.csv").write_text("\n".join(lines))
    samples = [(0, 0.0, 500, 400), (1, 10.0, 1000, 400), (3, 12.0, 3000, 1000), (4, 13.0, 9000, 0)]
    lines = ["Batch Id,Time (sec),kv_mapped_bytes,kv_idle_bytes", *(",".join(map(str, each)) for each in samples)]
    (tmp_path / "run" / TABLES_FOLDER / "memory_metrics.csv").write_text("\n".join(lines))
    row = made("decode", tmp_path).iloc[0]
    assert (row["num_steps"], row["decode_tokens_per_s"], row["median_step_ms"]) == (3, 6.0, 250.0)
    assert row["allocated_bytes_per_s"] == (2000 - 600) / 2


def test_workloads_are_named_by_what_they_are() -> None:
    assert workload_name(parse_options(["--length_provider=trace"])) == "arxiv"
    fixed = ["--length_provider=fixed", "--prefill_tokens=7", "--decode_tokens=3"]
    assert workload_name(parse_options(fixed)) == "7 + 3 tokens"
    rated = ["--interval_provider=gamma", "--gamma_request_interval_generator.qps=3"]
    assert rate_of(parse_options(rated)) == 3
    assert rate_of(parse_options([])) is None
    assert rate_of(parse_options([*rated, "--request_generator.provider=trace"])) is None


def test_a_replayed_trace_has_the_requests_of_its_file(tmp_path: Path) -> None:
    replay = {"request_generator.provider": "trace", "trace_request_generator.trace_file": "some/day.csv"}
    write_result(tmp_path / "run", {**replay, "interval_provider": "poisson"}, request_e2e_time={"max": 2.0})
    row = made("makespan", tmp_path).iloc[0]
    assert (row["workload"], row["num_requests"]) == ("day", 4) and pd.isna(row["qps"])
