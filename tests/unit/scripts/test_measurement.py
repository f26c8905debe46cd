"""Rows, files, budgets and loads of the measuring scripts, with a fake engine. No model and no GPU."""

import csv
import os
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from sarathi.benchmark.engines.device import (
    NUM_SAMPLES,
    Kernel,
    clock_and_power,
    idle_share,
    operation_of,
    time_by_operation,
)
from sarathi.benchmark.engines.load import STAGES, Load
from sarathi.benchmark.engines.sizes import FULL, SMALL
from sarathi.benchmark.kernels.timing import steady
from sarathi.benchmark.records import Attempts, Budget, Record, Table, read_records
from sarathi.benchmark.revisions.compare import Samples, Task
from sarathi.benchmark.workload.lengths import trace_requests


class FakeEngine:
    """One token a request a step, after as many steps as its prompt takes at so many tokens a step."""

    backend = "fake"
    vocab_size = 100
    max_model_len = 512
    max_num_seqs = 8
    capacity_tokens = 4096

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.tokens_a_step: int | None = None
        self.limits: list[int | None] = []

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def add(self, prompt: list[int], output_tokens: int) -> str:
        name = str(random.random())
        self.left[name] = output_tokens
        self.waiting[name] = -(-len(prompt) // (self.tokens_a_step or len(prompt))) - 1
        return name

    def step(self) -> Iterator[tuple[str, list[int]]]:
        ready = [name for name in self.left if self.waiting[name] == 0]
        for name in self.left:
            self.waiting[name] = max(0, self.waiting[name] - 1)
        for name in ready:
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
        return iter([(name, [7]) for name in ready])

    def abort(self, request_ids: Sequence[str]) -> None:
        for name in request_ids:
            self.left.pop(name, None)

    def limit_step(self, tokens: int | None) -> None:
        assert not self.has_work
        self.tokens_a_step = tokens
        self.limits.append(tokens)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return Load(FakeEngine(), Table(tmp_path / "rows.csv"), "m", SMALL)


def test_every_stage_leaves_its_rows_and_no_request(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    Budget(60, load.table.attempts).run(load.plan(STAGES))
    assert load.table.attempts.exit_code() == 0 and "failed" not in capsys.readouterr().out
    works = {row.work for row in load.table.records}
    assert {"prefill", "decode", "decode p99 step", SMALL.chunked_work} < works
    assert len({work.partition(":")[0] for work in works}) == 7
    assert not load.engine.has_work and load.engine.limits == [SMALL.chunk, None]
    assert all(row.value > 0 for row in load.table.records)


def test_decode_is_measured_where_all_decode(load: Load) -> None:
    load.engine.limit_step(16)
    prompts = [16, 48, 160]
    found = load.decoding(prompts, steps=20)
    assert len(found.steps_ms) == 20
    assert found.ms_per_token == pytest.approx(statistics.fmean(found.steps_ms))
    assert statistics.fmean(prompts) + 8 <= found.mean_context <= statistics.fmean(prompts) + 8 + 20 + 10


def test_throughput_tells_in_which_steps_the_time_went(load: Load) -> None:
    load.engine.limit_step(16)
    load.throughput("chat", [(16, 4), (48, 2), (16, 30)] + [(16, 2)] * 17)
    rate, *spent = load.table.records
    assert rate.unit == "output tokens/s"
    kinds = ["with prompts", "of up to 64 sequences", "of up to 16 sequences"]
    assert {row.work for row in spent} == {f"chat: steps {kind}" for kind in kinds}
    assert sum(row.value for row in spent) == pytest.approx(70 / rate.value)


def test_shapes_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    load = Load(FakeEngine(), Table(tmp_path / "rows.csv"), "m", FULL)
    assert load.decode_shapes() == []
    load.engine.max_model_len, load.engine.capacity_tokens = 132_096, 100_000
    assert load.decode_shapes() == [(1, 1024), (1, 4096), (1, 16384)]


def test_lengths_repeat_by_seed_and_keep_their_limits() -> None:
    seed = random.randrange(1000)
    print("seed", seed)
    uniform, chats = FULL.uniform_requests(seed), FULL.chat_requests(seed, 10**6)
    assert uniform == FULL.uniform_requests(seed) != FULL.uniform_requests(seed + 1)
    assert len(uniform) == 256 and all(100 <= n <= 1024 for pair in uniform for n in pair)
    prompts, outputs = zip(*chats, strict=True)
    assert len(chats) == 1000 and 180 < statistics.median(prompts) < 290 and 155 < statistics.median(outputs) < 230
    assert min(prompts + outputs) >= 4 and max(prompts) <= 4096 and max(outputs) <= 2048
    assert trace_requests(50, 32768, 500) == [(32703, 65)] * 50


def test_rows_survive_the_file_and_are_added_to(tmp_path: Path) -> None:
    rows = [Record("m", "decode", name, 4, 32, value, "ms/token") for name, value in (("ours", 2.0), ("theirs", 3.0))]
    for row in rows:
        Table(tmp_path / "t.csv", run=row.backend).add(row)
    table = Table(tmp_path / "t.csv")
    assert table.records == rows
    table.compare(rows[0], rows[1])
    [ours, theirs] = read_records(tmp_path / "t.csv")
    assert (ours.reference, ours.ratio, theirs.ratio) == ("theirs", 1.5, None)
    with (tmp_path / "t.csv").open() as file:
        assert ",".join(next(csv.reader(file))) == "model,work,backend,batch,context,value,unit,reference,ratio"


def interrupt_writing(frame: pd.DataFrame, file: Any, **_: object) -> None:
    """DataFrame.to_csv that ^C interrupts."""
    with open(file, "w") if isinstance(file, Path) else nullcontext(file) as opened:
        opened.write("model,wo")
    raise KeyboardInterrupt


def test_an_interrupt_while_a_table_is_rewritten_keeps_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, sample = Record("m", "decode", "ours", 4, 32, 2.0, "ms/token"), {"before": 2.0, "after": 1.0}
    table, samples = Table(tmp_path / "t.csv"), Samples(tmp_path)
    table.add(row)
    samples.add("m", "b", Task("decode", 4, 32, "ms/token", {}), sample, 0)
    monkeypatch.setattr(pd.DataFrame, "to_csv", interrupt_writing)
    with pytest.raises(KeyboardInterrupt):
        table.add(row)
    with pytest.raises(KeyboardInterrupt):
        samples.add("m", "b", Task("decode", 4, 32, "ms/token", {}), sample, 1)
    assert read_records(tmp_path / "t.csv") == [row]
    assert Samples(tmp_path).values["value"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(("unit", "ratio"), [("ms", 2.0), ("s", 2.0), ("output tokens/s", 0.5), ("tokens", 0.5)])
def test_a_ratio_above_one_is_better(unit: str, ratio: float) -> None:
    ours, other = (Record("m", "w", name, 1, 1, value, unit) for name, value in (("a", 1.0), ("b", 2.0)))
    assert ours.compared_to(other).ratio == ratio


def test_budget_goes_on_after_a_failure_and_names_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    attempts = Attempts()
    Budget(60, attempts).run([("bad", lambda: 1 / 0), ("good", lambda: done.append("good"))])
    Budget(-1, attempts).run([("late", lambda: done.append("late"))])
    out = capsys.readouterr().out
    assert done == ["good"] and "bad failed" in out and "out of time for: late" in out
    assert attempts.exit_code() == 1 and "# 1 failed: bad\n" in capsys.readouterr().out


def test_what_does_not_fit_the_budget_is_no_failure() -> None:
    attempts = Attempts()
    Budget(-1, attempts).run([("late", lambda: 1 / 0)])
    assert attempts.exit_code() == 0


def test_a_part_that_fails_is_named_with_its_measurement() -> None:
    attempts = Attempts()
    assert attempts.run("decode 1 x 1024", lambda: (attempts.run("fa3", lambda: 1 / 0), 7)) == (None, 7)
    assert attempts.run("decode 2 x 1024", lambda: 1 / 0) is None
    assert attempts.failed == ["decode 1 x 1024: fa3", "decode 2 x 1024"]


def test_a_script_whose_measurement_failed_says_so_in_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import benchmark_allocator

    words = ["--test", "--backend", "foo", "--skip-library", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["script", *words])
    assert benchmark_allocator.main() == 1
    assert "2 failed: decode under foo, decode under foo_sync" in capsys.readouterr().out


def test_page_sizes_that_cannot_be_compared_cost_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights taken off, the smaller model has room for all the requests and the larger one does not."""
    import benchmark_page_size

    (tmp_path / "few.csv").write_text("num_prefill_tokens,num_decode_tokens\n" + "4000,100\n" * 10)
    words = ["--test", "--trace", str(tmp_path / "few.csv"), "--minus-weights", "--budget-bytes", "17e9"]
    words += ["--models", "Yi-6B-200K", "Llama-3-8B", "--pages", "2mb", "--layouts", "per layer"]
    monkeypatch.setattr(sys, "argv", ["script", *words, "--output", str(tmp_path)])
    assert benchmark_page_size.main() == 1
    [_, row] = (tmp_path / "max_batch_minus_weights.csv").read_text().splitlines()
    assert row.startswith("Llama-3-8B")


def test_idle_is_what_no_kernel_covers() -> None:
    assert idle_share([Kernel(*span, "k") for span in [(5, 6), (0, 2), (1, 3), (9, 10)]]) == pytest.approx(0.5)
    assert idle_share([Kernel(0, 10, "k"), Kernel(2, 3, "k")]) == 0


def test_time_at_which_several_kernels_run_counts_once_for_the_first_of_them() -> None:
    ran = [(4, 9, "nvjet_tst"), (0, 5, "attention_kernel"), (6, 8, "_silu_kernel"), (8, 12, "x")]
    assert time_by_operation([Kernel(*each) for each in ran]) == {
        "attention": 5,
        "matrix products": 4,
        "all else": 3,
    }


@pytest.mark.parametrize(
    ("kernel", "operation"),
    [
        ("attention_kernel", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, ...", "attention"),
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<...", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, ...", "matrix products"),
        ("_matvec_kernel", "matrix products"),
        ("_rms_norm_kernel", "all else"),
        ("Memcpy HtoD (Pinned -> Device)", "all else"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, operation: str) -> None:
    assert operation_of(kernel) == operation


def test_clock_and_power_are_asked_for_while_steps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, said = tmp_path / "nvidia-smi", tmp_path / "said"
    program.write_text(f'#!/bin/sh\necho "$@" >> {said}\nsleep 0.05\necho "1$(wc -l < {said})05, 690.1"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a-b"))
    steps: list[float] = []
    assert clock_and_power(lambda: steps.append(0.0)) == (1305.0, 690.1)
    asked = said.read_text().splitlines()
    assert len(asked) == NUM_SAMPLES and all(line.startswith("--id=GPU-a-b ") for line in asked)
    assert len(steps) >= NUM_SAMPLES


def test_quantiles_of_steps_are_steps(tmp_path: Path) -> None:
    import benchmark_allocator

    steps = [random.random() for _ in range(101)]
    found = {name: value for name, value, _ in benchmark_allocator.summary(steps)}
    assert found["decode step max"] == max(steps) and found["decode step p50"] == sorted(steps)[50]
    assert found["decode step p99"] == sorted(steps)[99]


def test_steady_is_the_median_once_a_device_has_been_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    slower = iter([1.0, 1.0, 2.0, 3.0, 3.0, 9.0])
    assert steady(lambda: next(slower), seconds=5) == 3.0
    assert steady(lambda: 7.0, seconds=0) == 7.0
