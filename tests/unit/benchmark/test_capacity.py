"""The search against servers whose capacity is known: latency rises with the rate by a rule that tests invent."""

from pathlib import Path

import numpy as np
import pytest

from sarathi.benchmark.capacity import main as main_module
from sarathi.benchmark.capacity.main import describe, key_of, write_capacity
from sarathi.benchmark.capacity.search import Probe, ProbeLog, SearchLimits, search
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.config.schema import BenchmarkConfig

SEED = int(np.random.SeedSequence().entropy % 2**31)


class Server:
    """Meets the target up to its capacity; counts how often it is asked."""

    def __init__(self, capacity_qps: float, breaks_at: int | None = None) -> None:
        self.capacity_qps, self.breaks_at, self.num_probes = capacity_qps, breaks_at, 0

    def __call__(self, qps: float) -> Probe:
        self.num_probes += 1
        if self.num_probes == self.breaks_at:
            raise KeyboardInterrupt
        return Probe(qps, qps / self.capacity_qps, qps <= self.capacity_qps, 10)


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
    with pytest.raises(ValueError, match=r"p.jsonl is no file of probes"):
        ProbeLog(tmp_path / "p.jsonl", "k")


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["--tolerance=0.5", "--max_probes=3", "--start_qps=9", "--output_dir=x", "--write_plots=false"], True),
        (["--poisson_request_interval_generator.qps=7"], True),
        (["--capacity_search.target_s=9"], False),
        (["--num_requests=3"], False),
        (["--enable_op_level_metrics"], False),
    ],
)
def test_probes_are_of_one_configuration_where_it_decides_their_value(words: list[str], same: bool) -> None:
    assert (key_of(parse_options(words)) == key_of(parse_options([]))) == same


def test_help_names_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["--help"]) == 0
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
    [(1e9, 3, "at least 4.000 "), (3.0, 3, "from 2.000 to 4.000 "), (3.0, 20, "capacity 3.000 "), (1e-9, 3, "no rate")],
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


def test_gives_up_after_max_probes(tmp_path: Path) -> None:
    server = Server(capacity_qps=0.0001)
    probes, found = search(server, ProbeLog(tmp_path / "p.jsonl", "k"), SearchLimits(1.0, 0.05, 5))
    assert found is None and len(probes) == server.num_probes == 5


def test_table_and_plot(tmp_path: Path) -> None:
    config = parse_options(["--output_dir", str(tmp_path), "--capacity_search.metric", "ttft"])
    probes, found = search(Server(5.0), ProbeLog(tmp_path / "p.jsonl", "k"), SearchLimits(1.0, 0.05, 20))
    write_capacity(config, probes)
    lines = (tmp_path / "capacity.csv").read_text().splitlines()
    assert lines[0] == "qps,value_s,meets,num_completed" and len(lines) == len(probes) + 1
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")
    text = describe(config, probes, found)
    assert "P99 ttft" in text and f"capacity {found:.3f} requests a second" in text
