"""Random histories of scheduler, prefix index and ledger over the real allocator, whose memory is read in each step."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter

import pytest
import torch
from cache_worker import CacheWorker
from test_random_histories import History

from sarathi.config.backend import BackendSpec
from sarathi.core.block_space_manager.prefix_caching import manager, recycling
from sarathi.core.factory import make_block_space_manager
from sarathi.core.scheduler import Scheduler, make_scheduler, memory_recovery
from sarathi.worker.cache_engine.base import KVCacheSpec

HISTORIES = int(os.environ.get("HISTORIES", "3400"))
BACKENDS = ("sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb", "sdpa_vattn_sync_4kb")


class CacheHistory(History):
    """A history over a real cache."""

    worker: CacheWorker

    def _make_pair(self, backend: str, eviction: str) -> tuple[Scheduler, CacheWorker]:  # type: ignore[override]
        rng, spec = self.rng, BackendSpec.parse(backend)
        num_layers, head_size = rng.choice(((1, 256), (2, 128), (1, 384), (2, 512)))  # tokens of 512 bytes and more
        num_retained = self.config.max_num_seqs + rng.choice((0, 1, 8))
        cache = KVCacheSpec(
            num_layers, 1, head_size, torch.float32, self.config.max_num_seqs, self.max_len, rng.choice((0, 0, 3)),
            num_retained,
        )  # fmt: skip
        row_tokens = 4096 / (4 * head_size * (num_layers if spec.megacache else 1))
        worker = CacheWorker(spec, cache, 2 + int(self.max_len * rng.uniform(0.6, 2.5) / row_tokens))
        ledger = make_block_space_manager(spec, worker.capacity, eviction)
        return make_scheduler(self.config, ledger, self.max_len, self.num_micro_batches), worker

    def _check_rows(self) -> None:
        """Failed steps map nothing, and no step maps what kernels would read past the longest sequence."""
        manager = self.scheduler.block_space_manager
        counted = manager.num_used_rows + manager.stats.num_retained_rows
        held = self.worker.held_rows()
        assert held <= counted and (held == counted or self.worker.num_failures or manager.capacity.over_read_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_step_changes_the_tokens_of_another(
    backend: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: outputs are those of each request alone, and the books of ledger, index and cache agree."""
    caplog.set_level(logging.ERROR, logger="sarathi")
    monkeypatch.setattr(memory_recovery, "_RETRY_STEPS", 20)
    monkeypatch.setattr(manager, "_MIN_HIT_TOKENS", 1)
    monkeypatch.setattr(manager, "_MIN_WAIT_TOKENS", 2)
    monkeypatch.setattr(manager, "_LOST_SHARE", 4)
    monkeypatch.setattr(recycling, "_KEPT", 3)
    monkeypatch.setattr(recycling, "_KEPT_WHERE_SCARCE", 1)
    for module in (manager, recycling):
        monkeypatch.setattr(module, "BEGINNING_TOKENS", 2)
    total: Counter[str] = Counter()
    start = int(os.environ.get("SEED", random.randrange(2**40)))
    for seed in range(start, start + HISTORIES):
        history = CacheHistory(random.Random(seed), ("sarathi", "vllm", "orca")[seed % 3], backend, True)
        try:
            history.play()
            history.check_outputs()
        except Exception as error:
            raise AssertionError(f"SEED={seed} {backend}: {error!r}") from error
        finally:
            history.worker.cache.close()
        total.update(history.scheduler.block_space_manager.stats._asdict())
        total.update(checked=history.worker.num_checked, failures=history.worker.num_failures)
    print(total)
    assert min(total["num_mapped_tokens"], total["num_copied_tokens"], total["num_evicted_rows"]) > HISTORIES / 10
    assert total["num_hit_tokens"] > total["num_mapped_tokens"] + total["num_copied_tokens"]
    assert total["checked"] > HISTORIES and total["failures"] > 0
