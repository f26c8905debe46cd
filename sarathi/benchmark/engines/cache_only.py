"""An executor with a real KV cache and no model, to measure scheduling, messages and memory alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sarathi.config.backend import BackendSpec
from sarathi.executor.base import Executor
from sarathi.messages import (
    Chunk,
    CompletedStep,
    MemoryStats,
    Resolution,
    SampledToken,
    SchedulerOutput,
    StepResult,
)
from sarathi.worker.cache_engine.base import KVCacheSpec
from sarathi.worker.cache_engine.factory import create_cache_engine
from vattention import OutOfMemoryError

NextToken = Callable[[Chunk], int]
_VOCAB_SIZE = 2**17


def same_token(chunk: Chunk) -> int:
    """Sample the same token for every chunk."""
    return 7


class CacheOnlyExecutor(Executor):
    """One rank on the CPU. A step maps, shares and copies memory as with a model, but computes nothing.

    next_token: the token that a chunk samples.
    """

    num_stages, max_in_flight, takes_functions = 1, 1, False

    def __init__(
        self, backend: BackendSpec, spec: KVCacheSpec, budget_bytes: int, next_token: NextToken = same_token
    ) -> None:
        self.cache = create_cache_engine(backend, spec, torch.device("cpu"), budget_bytes)
        self.capacity, self.token_bytes = self.cache.capacity, spec.token_bytes
        self.vocab_size, self.max_model_len = _VOCAB_SIZE, spec.max_model_len
        self.resolution = Resolution(str(backend), "cpu", str(spec.dtype).removeprefix("torch."), 2.0**-23)
        self._next_token = next_token

    def launch(self, out: SchedulerOutput) -> CompletedStep:
        self.cache.release((*out.preempted, *out.finished), out.prefixes)
        try:
            self.cache.prepare(out.chunks, out.prefixes.shared)
        except OutOfMemoryError as error:
            return CompletedStep(StepResult(out.step_id, available_rows=error.available))
        self.cache.copy_prefixes()
        tokens = [SampledToken(chunk.request_id, self._next_token(chunk)) for chunk in out.chunks if chunk.samples]
        self.cache.prefetch(out.chunks)
        return CompletedStep(StepResult(out.step_id, tuple(tokens)))

    def wait(self) -> None:
        """Nothing is running."""

    def memory_stats(self) -> MemoryStats:
        return self.cache.stats()

    def resize_cache(self, rows: int) -> bool:
        try:
            self.cache.resize_rows(rows)
        except OutOfMemoryError:
            return False
        return True

    def drop_weights(self) -> None:
        """There are no weights."""

    load_weights = drop_weights

    def check_integrity(self) -> None:
        self.cache.check_integrity()

    def shutdown(self) -> None:
        self.cache.close()
