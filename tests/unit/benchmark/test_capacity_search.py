"""The search against servers whose capacity is known: latency rises with the rate by a rule that tests invent."""

from pathlib import Path

import numpy as np
import pytest

from sarathi.benchmark.capacity_search.main import describe, write_capacity
from sarathi.benchmark.capacity_search.search import Probe, ProbeLog, SearchLimits, search
from sarathi.benchmark.config.options import parse_options

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
    search(Server(3.0), ProbeLog(tmp_path / "p.jsonl", "one"), SearchLimits(1.0, 0.1, 20))
    with pytest.raises(ValueError, match="probes of another configuration"):
        ProbeLog(tmp_path / "p.jsonl", "two")


def test_gives_up_after_max_probes(tmp_path: Path) -> None:
    server = Server(capacity_qps=0.0001)
    probes, found = search(server, ProbeLog(tmp_path / "p.jsonl", "k"), SearchLimits(1.0, 0.05, 5))
    assert found is None and len(probes) == server.num_probes == 5


def test_table_and_plot(tmp_path: Path) -> None:
    config = parse_options(["--output_dir", str(tmp_path), "--capacity_search.metric", "ttft"])
    probes, found = search(Server(5.0), ProbeLog(tmp_path / "p.jsonl", "k"), SearchLimits(1.0, 0.1, 20))
    write_capacity(config, probes)
    lines = (tmp_path / "capacity.csv").read_text().splitlines()
    assert lines[0] == "qps,value_s,meets,num_completed" and len(lines) == len(probes) + 1
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")
    text = describe(config, probes, found)
    assert "P99 ttft" in text and f"capacity {found:.3f} requests a second" in text
