"""One rank: its share of the model and of the cache, and one step on them; knows no queues and no other rank."""

import logging
from dataclasses import replace
from typing import NamedTuple

from sarathi.config.backend import resolve_backend
from sarathi.config.schema import EngineConfig
from sarathi.messages import CacheCapacity, MemoryStats, SchedulerOutput, StepResult
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.base import create_backend
from sarathi.model_executor.loader.loader import load_weights, open_checkpoint
from sarathi.model_executor.models.decoder import Decoder
from sarathi.worker.cache_engine.base import CacheShape
from sarathi.worker.cache_engine.factory import create_cache_engine
from sarathi.worker.device import choose_placement
from sarathi.worker.model_runner import Flight
from sarathi.worker.sequences import SequenceTable
from sarathi.worker.warm_up import create_runner, initial_budget_bytes, size_cache
from vattention import OutOfMemoryError

logger = logging.getLogger(__name__)


class ModelLengthError(ValueError):
    """max_model_len is more than the model has positions for."""


class PendingStep(NamedTuple):
    """A step that has been started, or that could not be."""

    step_id: int
    flight: Flight | None
    available_rows: int | None = None

    def result(self) -> StepResult:
        """Waits for the step to end."""
        if self.flight is None:
            return StepResult(self.step_id, available_rows=self.available_rows)
        computed = self.flight.result()
        return StepResult(self.step_id, computed.tokens, computed.model_s, host=computed.host)


class Worker:
    """Built from the configuration alone, so that every rank can build its own.

    Raises ValueErrors that name the setting: unknown model, wrong format, broken checkpoint, missing kernel, no memory.
    """

    def __init__(self, config: EngineConfig) -> None:
        checkpoint = open_checkpoint(config.model)
        arch = checkpoint.architecture
        place = choose_placement(config.model, arch)
        self.backend = spec = resolve_backend(config.model.attention_backend, place.device.type)
        self.vocab_size = arch.vocab_size
        self.max_model_len = _model_length(config, arch)
        backend = create_backend(spec, arch, place)
        model = Decoder(arch, place, backend)
        load_weights(model, checkpoint, config.model.seed)
        over_read_tokens = backend.capabilities.over_read_tokens
        shape = CacheShape(arch, place, config.scheduler.max_num_seqs, self.max_model_len, 0, over_read_tokens)
        shape = replace(shape, budget_bytes=initial_budget_bytes(spec, config, shape.token_bytes, place.device))
        self.token_bytes, self.dtype_eps = shape.token_bytes, place.dtype_eps
        self._cache = create_cache_engine(spec, shape)
        self._runner = create_runner(model, backend, self._cache, shape, spec)
        self.model = self._runner.model
        size_cache(self._runner, self._cache, config, shape)
        self._sequences = SequenceTable(config.model.seed)
        self._num_shortages = 0  # steps sent behind one that failed must fail too, until the scheduler knows of it
        self._available_rows = 0

    @property
    def capacity(self) -> CacheCapacity:
        return self._cache.capacity

    @property
    def max_in_flight(self) -> int:
        """Steps that may be started before the first one's result is taken."""
        return self._runner.max_in_flight

    def launch(self, out: SchedulerOutput) -> PendingStep:
        """Starts a step. Where memory runs out nothing is computed, and the result says how many rows there are."""
        self._cache.release((*out.preempted, *out.finished))
        self._sequences.drop(out.finished)
        self._sequences.add(out.new_requests)
        if self._num_shortages > out.num_recoveries:
            return PendingStep(out.step_id, None, self._available_rows)
        try:
            self._cache.prepare(out.chunks)
        except OutOfMemoryError as error:
            logger.warning("no memory for step %d: %s", out.step_id, error)
            self._num_shortages += 1
            self._available_rows = error.available
            return PendingStep(out.step_id, None, error.available)
        return PendingStep(out.step_id, self._runner.launch(out.chunks, self._sequences) if out.chunks else None)

    def wait(self) -> None:
        self._runner.wait()

    def memory_stats(self) -> MemoryStats:
        return self._cache.stats()

    def check_integrity(self) -> None:
        self._cache.check_integrity()

    def close(self) -> None:
        self._cache.close()


def _model_length(config: EngineConfig, arch: ModelArchitecture) -> int:
    """Random weights were trained on no length, so they may be asked for any."""
    asked = config.model.max_model_len
    if asked is None:
        return arch.max_positions
    if asked > arch.max_positions and config.model.load_format != "dummy":
        raise ModelLengthError(
            f"max_model_len={asked}: the model has positions for at most {arch.max_positions} tokens"
        )
    return asked
