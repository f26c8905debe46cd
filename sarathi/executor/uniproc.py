"""Executor with one rank, in this process."""

import gc
import weakref
from typing import NoReturn

import torch

from sarathi.config.schema import EngineConfig
from sarathi.executor.base import Executor
from sarathi.executor.steps import Steps
from sarathi.messages import MemoryStats, SchedulerOutput, StepResult
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.parallel.ranks import OneRank
from sarathi.model_executor.sampling.grammar import MakeVocabulary, no_vocabulary
from sarathi.worker.worker import Worker


class UnsupportedParallelismError(ValueError):
    """More ranks than this executor has."""


class _FrozenHeap:
    """Keeps modules, weights and graphs out of full garbage collections while an engine is open in this process.

    A full collection that visits them takes 0.1 s, in the middle of a step.
    """

    def __init__(self) -> None:
        self._num_engines = 0

    def enter(self) -> None:
        """Collect, so that no garbage is frozen, then freeze."""
        self._num_engines += 1
        gc.collect()
        gc.freeze()

    def leave(self) -> None:
        """Unfreeze when the last engine leaves."""
        self._num_engines -= 1
        if not self._num_engines:
            gc.unfreeze()


_FROZEN = _FrozenHeap()


class _ClosedWorker:
    """Replaces the worker after shutdown, so that its model and cache can be freed."""

    @property
    def model(self) -> NoReturn:
        raise RuntimeError("the executor is shut down: its model is gone")

    def prepare(self, out: SchedulerOutput) -> NoReturn:
        raise RuntimeError(f"the executor is shut down: it cannot run step {out.step_id}")

    run = cancel = prepare

    def wait(self) -> None:
        """Nothing is running."""

    def memory_stats(self) -> MemoryStats:
        return MemoryStats()

    def resize_cache(self, rows: int) -> bool:
        """There is no cache any more."""
        return True

    def drop_weights(self) -> None:
        """There are no weights any more."""

    load_weights = drop_weights

    def check_integrity(self) -> None:
        """Nothing to check."""

    def close(self) -> None:
        """Nothing to release."""


class UniprocExecutor(Steps, Executor):
    """One worker in this process. Raises ValueErrors that name the setting which cannot work."""

    takes_functions = True

    def __init__(self, config: EngineConfig, make_vocabulary: MakeVocabulary = no_vocabulary) -> None:
        parallel = config.parallel
        if parallel.tensor_parallel_size * parallel.pipeline_parallel_size != 1:
            raise UnsupportedParallelismError(
                f"tensor_parallel_size={parallel.tensor_parallel_size} and "
                f"pipeline_parallel_size={parallel.pipeline_parallel_size}: the in-process executor has one rank"
            )
        worker = Worker(config, OneRank(), make_vocabulary)
        super().__init__(worker)
        self._worker: Worker | _ClosedWorker = worker
        self._thaw = weakref.finalize(self, _FROZEN.leave)
        _FROZEN.enter()
        self.capacity, self.max_model_len, self.vocab_size = worker.capacity, worker.max_model_len, worker.vocab_size
        self.token_bytes, self.resolution = worker.token_bytes, worker.resolution
        self.max_in_flight = worker.max_in_flight

    @property
    def model(self) -> Decoder:
        """The model, for timing its parts."""
        return self._worker.model

    def execute(self, out: SchedulerOutput) -> StepResult:
        """Launch one step and wait for its result."""
        return self.launch(out).result()

    def wait(self) -> None:
        self._worker.wait()

    def memory_stats(self) -> MemoryStats:
        return self._worker.memory_stats()

    def resize_cache(self, rows: int) -> bool:
        return self._worker.resize_cache(rows)

    def drop_weights(self) -> None:
        self._worker.drop_weights()

    def load_weights(self) -> None:
        self._worker.load_weights()

    def check_integrity(self) -> None:
        self._worker.check_integrity()

    def shutdown(self) -> None:
        self._thaw()
        try:
            self._worker.close()
        finally:
            self._worker = _ClosedWorker()
            torch.cuda.empty_cache()  # torch keeps freed memory for later tensors
