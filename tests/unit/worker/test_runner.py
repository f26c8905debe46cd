"""What runs before the first request on a GPU, with a runner that only notes it, over real caches on the CPU."""

from dataclasses import replace

import pytest
import torch

from sarathi.config.backend import BackendSpec
from sarathi.config.load import make_config
from sarathi.messages import CompletedStep, StepResult
from sarathi.worker.cache_engine.base import CacheSettingsError, KVCacheSpec
from sarathi.worker.cache_engine.factory import create_cache_engine
from sarathi.worker.cuda_runner import CudaModelRunner
from sarathi.worker.warm_up import warm_up

CPU = torch.device("cpu")
SPEC = KVCacheSpec(num_layers=2, num_kv_heads=2, head_size=8, dtype=torch.float32, max_num_seqs=20, max_model_len=4096)
KIB = 1024


class Noting(CudaModelRunner):
    """Notes the tokens of each step's prompts, and checks that the host knows all of them."""

    def __init__(self) -> None:
        self.noted: list[list[int] | str] = []

    def launch(self, out, sequences) -> CompletedStep:
        chunks = out.chunks
        blocks = [block for chunk in chunks for block in chunk.block_ids]
        assert len(set(blocks)) == len(blocks)
        for chunk in chunks:
            assert len(sequences[chunk.request_id].tokens(0, chunk.num_tokens, 0)) == chunk.num_tokens
        self.noted.append([chunk.num_tokens for chunk in chunks])
        return CompletedStep(StepResult(out.step_id))

    def warm_up(self) -> None:
        self.noted.append("warm_up")

    def capture(self, max_tokens: int) -> None:
        assert max_tokens >= max(map(sum, (step for step in self.noted if step != "warm_up")))
        self.noted.append("capture")


def settled(monkeypatch: pytest.MonkeyPatch, backend: str, memory_bytes: int, **settings: object) -> Noting:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    config = make_config(max_num_seqs=20, memory_bytes=memory_bytes, device="cpu", **settings)
    cache, runner = create_cache_engine(BackendSpec.parse(backend), SPEC, CPU, memory_bytes), Noting()
    warm_up(runner, cache, cache.capacity, config, SPEC)
    stats = cache.stats()
    assert stats.mapped_bytes == stats.idle_bytes
    cache.check_integrity()
    return runner


@pytest.mark.parametrize("backend", ["sdpa_vattn_4kb", "sdpa_paged_16"])
def test_steps_of_all_sizes_run_before_the_graphs_are_made(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = settled(monkeypatch, backend, 4096 * KIB, chunk_size=300)
    assert runner.noted == [[300], "warm_up", [16] * 16, [64], [128], [192], [256], "capture"]


def test_without_graphs_only_the_largest_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = settled(monkeypatch, "sdpa_vattn_4kb", 4096 * KIB, chunk_size=300, enforce_eager=True)
    assert runner.noted == [[300], "warm_up"]


@pytest.mark.parametrize(
    ("chunk_size", "prompts"), [(10_000, [4095, 4095, 1810]), (8190, [4095, 4095]), (10**6, [4095] * 20)]
)
def test_the_largest_step_is_of_as_many_prompts_as_it_takes(
    chunk_size: int, prompts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = settled(monkeypatch, "sdpa_vattn_4kb", 2**26, chunk_size=chunk_size, enforce_eager=True)
    assert runner.noted == [prompts, "warm_up"]


@pytest.mark.parametrize("over_read_tokens", [64, 300])
def test_a_budget_in_which_no_token_fits_is_refused_with_the_arithmetic(over_read_tokens: int) -> None:
    """A row is 64 tokens; kernels may read on behind the last one."""
    spec = replace(SPEC, over_read_tokens=over_read_tokens)
    rows = -(-(1 + over_read_tokens) // 64)
    arithmetic = f"memory_bytes=16384 holds 1 pages .* takes {rows}, with the {over_read_tokens} tokens"
    with pytest.raises(CacheSettingsError, match=arithmetic):
        create_cache_engine(BackendSpec.parse("sdpa_vattn_4kb"), spec, CPU, 16 * KIB)


def test_steps_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of 64 tokens: as many prompts, and steps of that many tokens."""
    runner = settled(monkeypatch, "sdpa_vattn_4kb", 64 * KIB, chunk_size=2048)
    assert runner.noted[:4] == [[256], "warm_up", [16] * 4, [64]]
    assert {sum(step) for step in runner.noted[6:-1]} == {256}
