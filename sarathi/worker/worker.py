"""One rank: its share of the model and of the KV cache, and the tokens of running requests."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b

from sarathi.config.schema import EngineConfig
from sarathi.messages import (
    CacheCapacity,
    Chunk,
    CompletedStep,
    MemoryStats,
    Resolution,
    SampledToken,
    SchedulerOutput,
    StepFuture,
    StepResult,
)
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.base import create_backend
from sarathi.model_executor.loader.loader import open_checkpoint
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.parallel.pipeline import Stage
from sarathi.model_executor.parallel.ranks import Ranks
from sarathi.model_executor.parallel.sharding import TensorShare
from sarathi.model_executor.sampling.grammar import GrammarCompiler, MakeVocabulary, no_vocabulary
from sarathi.worker.cache_engine.base import CacheEngine, KVCacheSpec
from sarathi.worker.cache_engine.factory import create_cache_engine, num_retained
from sarathi.worker.device import attention_backend, choose_cache_dtype, choose_placement
from sarathi.worker.mapped_weights import in_mapped_memory
from sarathi.worker.memory import check_budget, final_budget_bytes, initial_budget_bytes
from sarathi.worker.model_builder import ModelBuilder
from sarathi.worker.sending import Sending
from sarathi.worker.sequences import SequenceTable
from sarathi.worker.warm_up import create_runner, warm_up
from vattention import OutOfMemoryError

logger = logging.getLogger(__name__)
_TOO_MANY_ADDRESSES = "twice max_num_seqs slots of max_model_len tokens take too many addresses; lower one of the two"


class ModelLengthError(ValueError):
    """max_model_len is more than the model has positions for."""


class Worker:
    """A step is `prepare` and then, once every rank is prepared, `run`.

    Built from the configuration alone. Raises ValueErrors that name the setting: unknown model, wrong format, broken
    checkpoint, missing kernel, too little memory.
    """

    def __init__(self, config: EngineConfig, ranks: Ranks, make_vocabulary: MakeVocabulary = no_vocabulary) -> None:
        """make_vocabulary: called for the first request with a grammar."""
        self._ranks = ranks
        checkpoint = open_checkpoint(config.model)
        share = TensorShare(checkpoint.architecture, ranks.rank, ranks.size)
        whole = share.architecture if ranks.size > 1 else checkpoint.architecture
        stage = Stage(whole, ranks.stage, ranks.num_stages)
        arch = stage.architecture
        place = choose_placement(config.model, arch)
        check_budget(config.cache, place.device)
        self.vocab_size = share.arch.vocab_size
        self.max_model_len = _model_length(config, arch)
        backend = attention_backend(config.model)
        attention = create_backend(backend, arch, place)
        builder = ModelBuilder(config.model, share, stage, place, attention, ranks, self.max_model_len)
        mapped = config.model.mapped_weights
        self._builder = in_mapped_memory(builder) if mapped else builder
        model = self._builder.build(checkpoint)
        spec = KVCacheSpec(
            arch.num_layers, arch.num_kv_heads, arch.head_size, choose_cache_dtype(config.cache, place),
            config.scheduler.max_num_seqs, self.max_model_len, attention.capabilities.over_read_tokens,
        )  # fmt: skip
        if config.cache.prefix_caching:
            obstacle = _obstacle_to_sharing(model, ranks)
            wanted = 0 if obstacle else num_retained(backend, spec, place.device)
            spec = replace(spec, num_retained=ranks.least(wanted))
            if not spec.num_retained and not ranks.number:
                logger.warning("prefixes are not shared: %s", obstacle or _TOO_MANY_ADDRESSES)
        shares = spec.num_retained > 0
        cascades = shares and config.cache.cascade_attention and attention.enable_cascade()
        self.resolution = Resolution(
            str(backend), str(place.device), place.dtype_name, place.dtype_eps, shares, mapped, cascades
        )
        self.token_bytes = spec.token_bytes
        budget = ranks.least(
            initial_budget_bytes(config.cache, place.device, spec.token_bytes, can_grow=not backend.is_paged)
        )
        self._cache = create_cache_engine(backend, spec, place.device, budget)
        self._runner = create_runner(model, attention, self._cache, arch, spec, ranks)
        warm_up(self._runner, self._cache, _common_capacity(self._cache, ranks), config, spec)
        self._cache.resize(ranks.least(final_budget_bytes(config.cache, place.device, budget)))
        self.capacity = _common_capacity(self._cache, ranks)
        grammars = GrammarCompiler(self.vocab_size, make_vocabulary) if model.vocab_size else None
        self._sequences = SequenceTable(config.model.seed, grammars)
        self.sending: Sending | None = None  # where another engine takes what is computed

    @property
    def cache(self) -> CacheEngine:
        return self._cache

    @property
    def model(self) -> Decoder:
        return self._runner.model

    @property
    def max_in_flight(self) -> int:
        """Steps that may be started before the first one's result is taken."""
        return self._ranks.num_stages if self._ranks.num_stages > 1 else self._runner.max_in_flight

    def append_tokens(self, tokens: Iterable[SampledToken]) -> None:
        """Take in what another worker sampled, before the next step of these requests."""
        self._sequences.append(tokens)

    def prepare(self, out: SchedulerOutput) -> int | None:
        """Release and take in requests, then map memory for every chunk.

        Returns None, or, where memory is missing, how many rows there are in all; then no chunk may be run.
        """
        released = (*out.preempted, *out.finished)
        if self.sending is not None:
            self.sending.settle(released)
        if broken := self._sequences.not_finite.intersection(released):
            self._cache.clear(broken)
        self._cache.release(released, out.prefixes)
        self._sequences.drop(out.finished)
        self._sequences.add(out.new_requests)
        try:
            self._cache.prepare(_in_order(out), out.prefixes.shared)
        except OutOfMemoryError as error:
            logger.warning("rank %d has no memory for step %d: %s", self._ranks.number, out.step_id, error)
            return error.available
        return None

    def cancel(self, out: SchedulerOutput) -> None:
        """Undo the memory that `prepare` mapped, where another rank has too little for the step."""
        self._cache.cancel((*out.chunks, *out.received))

    def run(self, out: SchedulerOutput) -> StepFuture:
        """Compute a step for which `prepare` returned None."""
        if out.prefixes.shared:
            self._cache.copy_prefixes()
        if not out.chunks:
            return CompletedStep(StepResult(out.step_id))
        if self.sending is not None:
            self.sending.start(out.sent)
        return self._runner.launch(out, self._sequences)

    def wait(self) -> None:
        self._runner.wait()

    def memory_stats(self) -> MemoryStats:
        return self._cache.stats()

    def resize_cache(self, rows: int) -> bool:
        """Change the cache's memory to `rows` rows; False where requests hold more. See `Executor.resize_cache`."""
        self._runner.wait()  # steps in flight may use what is to be unmapped
        try:
            self._cache.resize_rows(rows)
        except OutOfMemoryError:
            return False
        return True

    def drop_weights(self) -> None:
        """Give the weights' memory back; no step may run until `load_weights`. See `Executor.drop_weights`."""
        self._runner.wait()
        self._builder.drop_weights(self._runner)

    def load_weights(self) -> None:
        """Read the weights again where they were dropped. Raises as the constructor does."""
        if self._builder.reload_weights(self._runner) and self.sending is not None:
            self.sending.attach(self.model.layers)

    def fingerprint(self) -> str:
        """A hash of the requests in the cache: their lengths, and the tokens that are computed."""
        sequences = self._sequences
        state = [
            (name, lengths, bytes(sequences[name].token_ids[: lengths[0]]))
            for name, lengths in sorted(self._cache.lengths().items())
        ]
        return blake2b(repr(state).encode()).hexdigest()

    def check_integrity(self) -> None:
        self._cache.check_integrity()

    def close(self) -> None:
        try:
            self._runner.wait()  # steps in flight, as after an interrupt, use what is to be unmapped
        finally:
            self._cache.close()


def _in_order(out: SchedulerOutput) -> Sequence[Chunk]:
    """Chunks and received prompts; those that share a prefix as they started, since one may share that of another."""
    if not out.received:
        return out.chunks
    order = {prefix.request_id: index for index, prefix in enumerate(out.prefixes.shared)}
    return sorted((*out.chunks, *out.received), key=lambda chunk: order.get(chunk.request_id, -1))


def _obstacle_to_sharing(model: Decoder, ranks: Ranks) -> str | None:
    """Why prefixes cannot be shared; None where a token's keys and values depend on those before it alone, and all
    ranks divide them into like rows.

    On a CPU a stage's thread computes, which copies of prefixes would overtake.
    """
    num_layers = len(model.layers)
    if ranks.num_stages > 1 and model.place.device.type == "cpu":
        return "stages compute in threads of their own on a CPU"
    if model.needs_rope_lengths:
        return "the model's RoPE depends on the length of the sequence"
    if ranks.least(num_layers) != -ranks.least(-num_layers):
        return "stages have unlike numbers of layers"
    return None


def _common_capacity(cache: CacheEngine, ranks: Ranks) -> CacheCapacity:
    """What every rank has. Stages of unlike numbers of layers may have tokens of unlike sizes: the largest counts."""
    own = cache.capacity
    return replace(own, rows=ranks.least(own.rows), token_bytes=-ranks.least(-own.token_bytes))


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
