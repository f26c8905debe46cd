"""The search against servers whose capacity is known: latency rises with the rate by a rule that tests invent."""

import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from sarathi.benchmark.capacity import main as main_module
from sarathi.benchmark.capacity.main import key_of
from sarathi.benchmark.capacity.report import describe, write_capacity
from sarathi.benchmark.capacity.search import Probe, ProbeLog, SearchLimits, search
from sarathi.benchmark.capacity.slos import Slo, measures_of
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.config.schema import BenchmarkConfig, CapacitySearchConfig
from sarathi.benchmark.run.outcome import COMPLETED, RunOutcome
from sarathi.benchmark.run.processes import ENDING
from sarathi.benchmark.workload import RequestSpec
from sarathi.metrics import RunRecords
from sarathi.metrics.request_record import RequestRecord

MEASURES = measures_of(CapacitySearchConfig())
SEED = 0  # set anew for each test: see tests/conftest.py


class Server:
    """Meets the target up to its capacity; counts how often it is asked."""

    def __init__(self, capacity_qps: float, breaks_at: int | None = None) -> None:
        self.capacity_qps, self.breaks_at, self.num_probes = capacity_qps, breaks_at, 0

    def __call__(self, qps: float) -> Probe:
        self.num_probes += 1
        if self.num_probes == self.breaks_at:
            raise KeyboardInterrupt
        values_s = {slo.name: min(slo.limit_s, 9.0) * qps / self.capacity_qps for slo in MEASURES}
        return Probe(qps, min(qps, self.capacity_qps), values_s, qps <= self.capacity_qps, 10)


@pytest.mark.parametrize("case", range(20))
def test_finds_the_capacity_within_tolerance(case: int, tmp_path: Path) -> None:
    rng = np.random.default_rng([SEED, case])
    print(f"seed {SEED}")
    capacity, start = (float(10**x) for x in rng.uniform(-2, 3, 2))
    limits = SearchLimits(start_qps=start, tolerance=0.05, max_probes=60)
    probes, found = search(Server(capacity), ProbeLog(tmp_path / "p.jsonl", "k"), limits)
    assert found is not None and found <= capacity <= found * 1.05
    assert [probe.qps for probe in probes] == sorted(probe.qps for probe in probes)


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    limits = SearchLimits(1.0, 0.02, 40)
    whole = Server(37.0)
    _, expected = search(whole, ProbeLog(tmp_path / "a.jsonl", "k"), limits)
    broken = Server(37.0, breaks_at=6)
    with pytest.raises(KeyboardInterrupt):
        search(broken, ProbeLog(tmp_path / "b.jsonl", "k"), limits)
    resumed = Server(37.0)
    _, found = search(resumed, ProbeLog(tmp_path / "b.jsonl", "k"), limits)
    assert found == expected
    assert resumed.num_probes == whole.num_probes - 5


def test_probes_of_another_configuration_are_not_mixed_in(tmp_path: Path) -> None:
    search(Server(3.0), ProbeLog(tmp_path / "p.jsonl", "one"), SearchLimits(1.0, 0.05, 20))
    with pytest.raises(ValueError, match="probes of another configuration"):
        ProbeLog(tmp_path / "p.jsonl", "two")


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path, limits = tmp_path / "p.jsonl", SearchLimits(1.0, 0.1, 20)
    _, expected = search(Server(3.0), ProbeLog(path, "k"), limits)
    whole = path.read_text()
    path.write_text(whole[:-9])
    server = Server(3.0)
    assert search(server, ProbeLog(path, "k"), limits)[1] == expected
    assert server.num_probes == 1 and path.read_text() == whole


@pytest.mark.parametrize("content", ["{}\n", "[1]\n", "qps\n", '{"key": "k", "speed": 3}\n'])
def test_a_file_of_something_else_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"p.jsonl is not a probe file"):
        ProbeLog(tmp_path / "p.jsonl", "k")


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["--tolerance=0.5", "--max_probes=3", "--start_qps=9", "--output_dir=x", "--write_plots=false"], True),
        (["--poisson_request_interval_generator.qps=7"], True),
        (["--tbt-slo-value=9"], False),
        (["--num_requests=3"], False),
        (["--enable_op_level_metrics"], False),
    ],
)
def test_probes_are_of_one_configuration_where_it_decides_their_value(words: list[str], same: bool) -> None:
    assert (key_of(parse_options(words)) == key_of(parse_options([]))) == same


def test_help_names_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["--help"]) == 0
    assert "meets latency targets" in capsys.readouterr().out
    assert main_module.main(["--help-knobs"]) == 0
    assert "max_probes: 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--interval_provider=static"], "needs one that has a rate"),
        (["--interval_provider=gamma", "--num_replicas=2"], "needs cluster.num_replicas 1"),
        (
            ["--interval_provider=gamma", "--enable_profiling", "--wandb_project=p"],
            "enable_profiling, metrics_store",
        ),
    ],
)
def test_what_a_search_cannot_do_is_told(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main_module.main([*words, f"--output_dir={tmp_path}"]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capacity", "max_probes", "told"),
    [
        (1e9, 3, "capacity at least 4.000 requests a second, asked for 4.000; no rate"),
        (3.0, 3, "at least 2.000 requests a second, asked for 2.000; 4.000 was too much, and max_probes"),
        (3.0, 20, "capacity 3.000 requests a second, asked for 3.000"),
        (1e-9, 3, "no rate"),
    ],
)
def test_says_how_far_the_capacity_is_known(capacity: float, max_probes: int, told: str, tmp_path: Path) -> None:
    config = parse_options(["--capacity_search.tolerance=0.05"])
    limits = SearchLimits(1.0, 0.05, max_probes)
    assert told in describe(config, *search(Server(capacity), ProbeLog(tmp_path / "p.jsonl", "k"), limits))


def test_an_interrupt_leaves_the_table_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(37.0, breaks_at=4)

    def find(config: BenchmarkConfig, log: ProbeLog) -> tuple[list[Probe], float | None]:
        return search(server, log, SearchLimits(1.0, 0.05, 12))

    monkeypatch.setattr(main_module, "find_capacity", find)
    words = ["--interval_provider=poisson", f"--output_dir={tmp_path}"]
    assert main_module.main(words) == 130
    assert len((tmp_path / "capacity.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_a_signal_after_the_last_request_of_a_probe_keeps_the_probe(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptedRunner:
        """In place of BenchmarkRunner: a signal comes when all requests have been answered."""

        def __init__(self, config: object, device: None, stop: threading.Event) -> None:
            self._stop = stop

        def __enter__(self) -> SimpleNamespace:
            runner = ran([record_of(0.0, 0.0, [0.5, 0.6])], 1.0, 1.0)
            return SimpleNamespace(workload=runner.workload, run=lambda specs: self._interrupted(runner.run(specs)))

        def __exit__(self, *_: object) -> None:
            pass

        def _interrupted(self, outcome: RunOutcome) -> RunOutcome:
            signal.raise_signal(number)
            assert self._stop.is_set()
            return outcome

    monkeypatch.setattr(main_module, "BenchmarkRunner", InterruptedRunner)
    before = signal.signal(number, signal.default_int_handler)  # it may be ignored here
    try:
        assert main_module.main(["--interval_provider=poisson", f"--output_dir={tmp_path}"]) == 130
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert len((tmp_path / "probes.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "capacity.csv").read_text().splitlines()) == 1 + 1


def test_gives_up_after_max_probes(tmp_path: Path) -> None:
    server = Server(capacity_qps=0.0001)
    probes, found = search(server, ProbeLog(tmp_path / "p.jsonl", "k"), SearchLimits(1.0, 0.05, 5))
    assert found is None and len(probes) == server.num_probes == 5


def test_table_and_plot(tmp_path: Path) -> None:
    config = parse_options(["--output_dir", str(tmp_path), "--ttft-slo-value", "30"])
    probes, found = search(Server(5.0), ProbeLog(tmp_path / "p.jsonl", "k"), SearchLimits(1.0, 0.05, 20))
    write_capacity(config, probes)
    lines = (tmp_path / "capacity.csv").read_text().splitlines()
    measured = "p50_scheduling_delay_s,p99_tbt_s,p99_ttft_s,p99_e2e_s"
    assert lines[0] == f"qps,completed_qps,{measured},meets,num_completed"
    assert len(lines) == len(probes) + 1
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")
    text = describe(config, probes, found)
    assert "p99_ttft_s 30" in text and f"capacity {found:.3f} requests a second" in text


def record_of(arrived: float, scheduled: float, tokens: list[float]) -> RequestRecord:
    record = RequestRecord("0_0", 4, arrived, None, scheduled_at_s=scheduled, closed_at_s=tokens[-1])
    record.token_times_s.extend(tokens)
    return record


def test_slos_are_quantiles_of_all_requests() -> None:
    records = RunRecords(0.0, 9.0, (record_of(0.0, 1.0, [2.0, 2.5, 3.5]), record_of(0.0, 3.0, [4.0, 4.1])))
    assert Slo("scheduling_delay", 0.5, 2.0).measure(records) == pytest.approx(2.0)
    assert Slo("tbt", 1.0, 1.0).measure(records) == pytest.approx(1.0)
    assert Slo("ttft", 0.5, 1.0).measure(records) == pytest.approx(3.0)
    assert Slo("tbt", 0.99, 1.0).measure(RunRecords(0.0, 1.0)) == float("inf")


def ran(records: list[RequestRecord], gap_s: float, duration_s: float) -> SimpleNamespace:
    """A runner of requests that came every gap_s seconds."""
    specs = [RequestSpec(number * gap_s, 4, 2) for number in range(len(records))]
    outcome = RunOutcome(COMPLETED, duration_s, len(records), {}, [], RunRecords(0.0, duration_s, tuple(records)))
    return SimpleNamespace(workload=lambda config: specs, run=lambda specs: outcome)


def test_a_queue_that_grows_misses_the_delay_though_tokens_come_fast() -> None:
    """The engine does one request a second: at 32 a second the gaps are short and the queue is long."""
    delays = [record_of(number / 32, float(number), [number + 0.5, number + 0.51]) for number in range(64)]
    probe = main_module._measure(ran(delays, 1 / 32, 64.0), parse_options(["--interval_provider=poisson"]), 32.0)
    assert probe.values_s["p99_tbt_s"] < 0.2 and probe.values_s["p50_scheduling_delay_s"] > 2 and not probe.meets


@pytest.mark.parametrize(("duration_s", "keeps_up"), [(2.1, True), (4.0, False), (64.0, False)])
def test_a_rate_that_the_engine_did_not_do_is_no_capacity(duration_s: float, keeps_up: bool) -> None:
    """64 requests run in one batch: none waits and tokens come fast, but all end long after the last has come."""
    together = [record_of(number / 32, number / 32, [number / 32 + 0.5, duration_s]) for number in range(64)]
    config = parse_options(["--interval_provider=poisson", "--tbt-slo-value=none"])
    probe = main_module._measure(ran(together, 1 / 32, duration_s), config, 32.0)
    assert probe.completed_qps == pytest.approx(64 / duration_s)
    assert (probe.meets, probe.values_s["p50_scheduling_delay_s"]) == (keeps_up, 0)
    told = "latencies met the targets, but the engine completed "
    assert (f"{told}{64 / duration_s:.3f} a second" in describe(config, [probe], None)) != keeps_up


def test_a_search_without_a_target_is_refused() -> None:
    none = ["--scheduling-delay-slo-value=none", "--tbt-slo-value=none", "--interval_provider=poisson"]
    assert main_module.main(none) == 1


GRID = """
schedulers:
  - {name: vllm, scheduler: vllm, batch_size: 128}
  - {name: orca, scheduler: orca, batch_size: 16}
  - {name: sarathi_512, scheduler: sarathi, chunk_size: 512, batch_size: 128}
traces:
  - {name: chat, trace_file: "./sharegpt.csv", max_seq_len: 8192, num_requests: 2048, start_qps: 2}
  - {name: arxiv, trace_file: "./arxiv.csv", max_seq_len: 16384, num_requests: 2048, start_qps: 1}
parallel_spec:
  - {name: tp_1, tp_dimension: 1, pp_dimension: 1}
  - {name: tp_2, tp_dimension: 2, pp_dimension: 1}
models:
  - {name: yi-34b, identifier: 01-ai/Yi-34B, parallel_specs: ["tp_2"], scheduler_specs: null, traces: null}
"""


def test_a_grid_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line and YAML of figures 5 and 6."""
    asked: list[BenchmarkConfig] = []

    def find(config: BenchmarkConfig, log: ProbeLog) -> tuple[list[Probe], float | None]:
        asked.append(config)
        return search(Server(3.0), log, SearchLimits(config.capacity_search.start_qps, 0.05, 12))

    monkeypatch.setattr(main_module, "find_capacity", find)
    (tmp_path / "grid.yml").write_text(GRID)
    words = ["--tbt-slo-value", "0.2", "--config-path", str(tmp_path / "grid.yml"), "--output-dir", str(tmp_path / "o")]
    assert main_module.main([*words, "--time-limit", "20", "--model.device=cpu"]) == 0
    assert [(c.replica_scheduler.provider, c.capacity_search.start_qps) for c in asked] == [
        (name, qps) for qps in (2, 1) for name in ("vllm", "orca", "sarathi")
    ]
    assert {(c.model.tensor_parallel_degree, c.time_limit, c.model.device) for c in asked} == {(2, 1200.0, "cpu")}
    assert [c.sarathi_scheduler.chunk_size for c in asked][2] == 512
    assert {c.trace_request_length_generator.least_tokens for c in asked} == {0}
    lines = (tmp_path / "o" / "capacity_grid.csv").read_text().splitlines()
    assert lines[0] == "models,traces,schedulers,parallel_spec,asked_qps,capacity_qps,found" and len(lines) == 7
    assert (tmp_path / "o" / "yi-34b_chat_sarathi_512_tp_2" / "capacity.csv").is_file()


def test_given_rates_are_run_in_place_of_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Command line of figures 7 and 9, whose script runs each system of a grid at the same rates."""
    server, limits = Server(0.8), []

    def measure(runner: object, config: BenchmarkConfig, qps: float) -> Probe:
        limits.append(config.time_limit)
        return server(qps)

    monkeypatch.setattr(main_module, "BenchmarkRunner", lambda config, device, stop: nullcontext())
    monkeypatch.setattr(main_module, "_measure", measure)
    (tmp_path / "grid.yml").write_text(GRID)
    words = ["--qps-values", "0.55", "1.0", "0.7", "--config-path", str(tmp_path / "grid.yml")]
    assert main_module.main([*words, "--output-dir", str(tmp_path / "o"), "--ttft-slo-quantile", "0.5"]) == 0
    assert set(limits) == {180 * 60.0} and server.num_probes == 6 * 3
    table = pd.read_csv(tmp_path / "o" / "yi-34b_chat_sarathi_512_tp_2" / "capacity.csv")
    assert table["qps"].tolist() == [0.55, 0.7, 1.0] and table["meets"].tolist() == [True, True, False]
    assert {"p50_ttft_s", "p99_tbt_s"} <= set(table.columns)
    assert "asked for 0.700; 1.000 was too much, and no rate between" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-1", "x", "1,,2", "inf", "nan"])
def test_given_rates_that_are_none_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--interval_provider=poisson", f"--output_dir={tmp_path}"]
    assert main_module.main([*words, f"--qps-values={text}"]) == 1
    assert f"qps_values is {text!r}: it must be rates above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "it must hold models, traces"),
        (GRID.replace("scheduler: vllm,", ""), "in schedulers lacks 'scheduler'"),
        (GRID.replace("chunk_size: 512,", ""), "'sarathi_512' lacks 'chunk_size'"),
        (GRID.replace('["tp_2"]', '["tp_9"]'), "no combination"),
        ("models: []", "models is "),
    ],
)
def test_a_grid_that_is_wrong_is_named(content: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "grid.yml").write_text(content)
    assert main_module.main([f"--config-path={tmp_path / 'grid.yml'}", f"--output_dir={tmp_path}"]) == 1
    assert told in capsys.readouterr().err
