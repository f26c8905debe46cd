"""All ranks behind one step; here the one rank of this process. Knows no queues, no text and no clock."""

import gc
import weakref
from typing import NoReturn

import torch

from sarathi.config.schema import EngineConfig
from sarathi.messages import CacheCapacity, MemoryStats, SchedulerOutput, StepResult
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.models.fused import FusedDecoder
from sarathi.worker.worker import PendingStep, Worker


class UnsupportedParallelismError(ValueError):
    """More ranks than this executor has."""


class _FrozenHeap:
    """What full collections leave out while an engine is open, in the whole process: modules, weights, graphs.

    To walk them all took 0.1 s in mid-step.
    """

    def __init__(self) -> None:
        self._engines = 0

    def enter(self) -> None:
        """Garbage goes first: frozen, it would stay."""
        self._engines += 1
        gc.collect()
        gc.freeze()

    def leave(self) -> None:
        """The last one thaws."""
        self._engines -= 1
        if not self._engines:
            gc.unfreeze()


_FROZEN = _FrozenHeap()


class _ClosedWorker:
    """In place of a worker that is gone, with its model and its cache."""

    @property
    def model(self) -> NoReturn:
        raise RuntimeError("the executor is shut down: its model is gone")

    def launch(self, out: SchedulerOutput) -> NoReturn:
        raise RuntimeError(f"the executor is shut down: it cannot run step {out.step_id}")

    def wait(self) -> None:
        """Nothing is under way."""

    def memory_stats(self) -> MemoryStats:
        return MemoryStats()

    def check_integrity(self) -> None:
        """There are no books."""

    def close(self) -> None:
        """There is nothing to give back."""


class Executor:
    """A worker in this process.

    max_model_len: tokens of the longest request. vocab_size: token ids are below. capacity: what a ledger gives out.
    backend: the one that was resolved, for the ledger that goes with it. token_bytes: one token's K and V, all layers.
    dtype_eps: the step from 1 to the next number in the dtype of weights, activations and cache.
    """

    def __init__(self, config: EngineConfig) -> None:
        parallel = config.parallel
        if parallel.tensor_parallel_size * parallel.pipeline_parallel_size != 1:
            raise UnsupportedParallelismError(
                f"tensor_parallel_size={parallel.tensor_parallel_size} and "
                f"pipeline_parallel_size={parallel.pipeline_parallel_size}: the in-process executor has one rank"
            )
        worker = Worker(config)
        self._worker: Worker | _ClosedWorker = worker
        self._thaw = weakref.finalize(self, _FROZEN.leave)
        _FROZEN.enter()
        self.backend = worker.backend
        self.capacity: CacheCapacity = worker.capacity
        self.max_model_len = worker.max_model_len
        self.vocab_size = worker.vocab_size
        self.token_bytes, self.dtype_eps = worker.token_bytes, worker.dtype_eps
        self.max_in_flight = worker.max_in_flight

    @property
    def model(self) -> Decoder | FusedDecoder:
        """For those who time its parts."""
        return self._worker.model

    def launch(self, out: SchedulerOutput) -> PendingStep:
        """Starts one step; at most max_in_flight of them may be started before the first one's result is taken."""
        return self._worker.launch(out)

    def execute(self, out: SchedulerOutput) -> StepResult:
        """Runs one step to its end."""
        return self.launch(out).result()

    def wait(self) -> None:
        """Returns when nothing of any step is under way, whoever has its PendingStep."""
        self._worker.wait()

    def memory_stats(self) -> MemoryStats:
        """The cache's memory now."""
        return self._worker.memory_stats()

    def check_integrity(self) -> None:
        """Raises where the cache's books disagree."""
        self._worker.check_integrity()

    def shutdown(self) -> None:
        """Gives the memory of cache and model back; nothing can be executed afterwards. Idempotent."""
        self._thaw()
        try:
            self._worker.close()
        finally:
            self._worker = _ClosedWorker()
            torch.cuda.empty_cache()  # torch would keep it for tensors to come
