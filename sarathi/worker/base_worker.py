"""One rank: its share of the model and of the cache, and one step on them; knows no queues and no other rank."""

from sarathi.config.backend import resolve_backend
from sarathi.config.schema import EngineConfig
from sarathi.messages import CacheCapacity, MemoryStats, SchedulerOutput, StepResult
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.backend import CacheLayer, create_backend
from sarathi.model_executor.loader import load_weights, open_checkpoint
from sarathi.model_executor.model_runner import ModelRunner
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.sequences import SequenceTable
from sarathi.worker.cache_engine.base import CacheShape
from sarathi.worker.cache_engine.factory import create_cache_engine
from sarathi.worker.device import cache_budget_bytes, choose_placement
from vattention import OutOfMemoryError


class ModelLengthError(ValueError):
    """max_model_len is more than the model has positions for."""


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
        budget_bytes = cache_budget_bytes(config.cache, place.device)
        shape = CacheShape(arch, place, config.scheduler.max_num_seqs, self.max_model_len, budget_bytes)
        self.token_bytes = shape.token_bytes
        self._cache = create_cache_engine(spec, shape)
        layers = [CacheLayer(*self._cache.layer(index), arch.window_of(index)) for index in range(arch.num_layers)]
        self._runner = ModelRunner(model, backend, self._cache, layers, prefetch=not spec.sync)
        self._sequences = SequenceTable(config.model.seed)

    @property
    def capacity(self) -> CacheCapacity:
        return self._cache.capacity

    def execute(self, out: SchedulerOutput) -> StepResult:
        """One step. Where memory runs out nothing is computed, and the result says how many rows there are."""
        self._cache.release((*out.preempted, *out.finished))
        self._sequences.drop(out.finished)
        self._sequences.add(out.new_requests)
        try:
            self._cache.prepare(out.chunks)
        except OutOfMemoryError as error:
            return StepResult(out.step_id, available_rows=error.available)
        if not out.chunks:
            return StepResult(out.step_id)
        computed = self._runner.run(out.chunks, self._sequences)
        return StepResult(out.step_id, computed.tokens, computed.model_s)

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
