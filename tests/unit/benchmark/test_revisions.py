"""Ratios of two checkouts, and the worker that measures one of them."""

from pathlib import Path

import pytest

from sarathi.benchmark.revisions import worker
from sarathi.benchmark.revisions.compare import Comparison, Engine, Samples, Task, gain

TIMES = Task("decode", 4, 1024, "ms/step", {})
RATES = Task("requests", 256, 2048, "output tokens/s", {})


def test_a_ratio_above_one_means_that_the_second_checkout_is_better() -> None:
    assert gain(2.0, 1.0, "s") == 2.0 and gain(100.0, 200.0, "output tokens/s") == 2.0


def test_ratios_are_of_medians_and_continued_runs_count(tmp_path: Path) -> None:
    for before, after in ((10.0, 9.0), (12.0, 10.0)):
        Samples(tmp_path).add("m", "b", TIMES, {"before": before, "after": after}, 0)
    samples = Samples(tmp_path)
    samples.add("m", "b", TIMES, {"before": 30.0, "after": 8.0}, 0)
    samples.add("m", "b", RATES, {"before": 50.0, "after": 40.0}, 0)
    found = samples.ratios().set_index("work")
    decode = found.loc["decode"]
    assert (decode.before, decode.after, decode.rounds) == (12.0, 9.0, 3)
    assert decode.ratio == pytest.approx(12 / 9)
    assert (decode.lowest_ratio, decode.highest_ratio) == pytest.approx((10 / 9, 30 / 8))
    assert found.loc["requests"].ratio == pytest.approx(0.8)
    assert (tmp_path / "revisions.csv").read_text().count("\n") == 3


def test_the_worker_imports_nothing_of_the_engine_but_its_public_api() -> None:
    lines = [line.strip() for line in Path(worker.__file__).read_text().splitlines()]
    ours = [line for line in lines if line.startswith(("from sarathi", "import sarathi", "from vattention"))]
    assert ours == ["from sarathi import LLM, SamplingParams"]


def test_steps_are_counted_by_the_slowest_request() -> None:
    stream = iter([(0, None), (0, None), (1, None), (1, None), (0, None)])
    counts = [0, 0]
    worker.advance(stream, counts, 2)
    assert counts == [2, 2]
    with pytest.raises(RuntimeError, match="ended before every request had 3 tokens"):
        worker.advance(stream, counts, 3)


def test_a_checkout_without_the_package_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sarathi").mkdir()
    (tmp_path / "sarathi" / "__init__.py").write_text("raise ImportError('no such engine')")
    with pytest.raises(RuntimeError, match="ended with code 1"):
        Engine(tmp_path, {})


def test_out_of_time_is_told(tmp_path: Path) -> None:
    sides = {"before": tmp_path, "after": tmp_path}
    none = Comparison(sides, {"m": "m"}, ["b"], {}, [TIMES], starts=1, rounds=1, seconds=0.0)
    assert none.run(Samples(tmp_path)) == ["m b: out of time"]
