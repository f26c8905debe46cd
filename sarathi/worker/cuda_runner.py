"""Asynchronous model runner of CUDA devices: launches step N + 1 while step N is running.

A sampled token stays on the device, where the next step reads it, and is copied to the host for the step's future.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sarathi.messages import Chunk, HostTimes, PrefixGroup, SchedulerOutput, StepResult
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.attention.gpu_backend import GpuBackend
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.sampling.plan import SamplingPlan, TokenMasks, plan_sampling, with_last_tokens
from sarathi.model_executor.sampling.sampler import Sampled, sample
from sarathi.sampling_params import SamplingParams
from sarathi.worker.cuda_graphs import DecodeGraph, DecodeGraphs, Limits, ladder
from sarathi.worker.model_runner import (
    KVCache,
    ModelRunner,
    int32,
    make_batch,
    read_outputs,
)
from sarathi.worker.piecewise_graphs import Parts, PiecewiseGraphs
from sarathi.worker.sequences import Sequence, SequenceTable
from sarathi.worker.transfer import to_device, to_host


class LaunchedStep:
    """The StepFuture of a step that runs on the device; result() appends its tokens to `sequences`."""

    def __init__(
        self, out: SchedulerOutput, sampled: Sampled | None, plan: SamplingPlan | None, sequences: SequenceTable,
        started: torch.cuda.Event, prepare_inputs_s: float,
    ) -> None:  # fmt: skip
        self._out, self._plan, self._sequences = out, plan, sequences
        self._sampled = to_host(sampled)
        self._started, self._done, self._prepare_inputs_s = started, _mark(), prepare_inputs_s
        self._outcome: StepResult | None = None

    def result(self) -> StepResult:
        if self._outcome is None:
            self._done.synchronize()
            ended_s = time.perf_counter()
            tokens, prompts = read_outputs(self._out.chunks, self._sampled, self._plan)
            self._sequences.append(tokens)
            host = HostTimes(self._prepare_inputs_s, time.perf_counter() - ended_s)
            model_s = self._started.elapsed_time(self._done) / 1e3
            self._outcome = StepResult(self._out.step_id, tokens, model_s, host=host, prompt_logprobs=prompts)
        return self._outcome


@dataclass(frozen=True, slots=True)
class _Inputs:
    """An eager step's tokens, and the slots of those requests that sample, [S] int32; on the device."""

    batch: Batch
    sample_slots: Tensor


class CudaModelRunner(ModelRunner):
    """Decode steps replay one CUDA graph where the backend allows it, other steps of few tokens one for each layer.

    All others are eager. Two steps may be in flight.
    """

    max_in_flight = 2

    def __init__(
        self, model: Decoder, backend: AttentionBackend, cache: KVCache, layers: Many[CacheLayer], limits: Limits
    ) -> None:
        super().__init__(model, backend, cache, layers)
        self._max_num_seqs = limits.max_num_seqs
        num_slots = layers[0].k.shape[0]
        self._last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=self._device)
        self._cascades = limits.cascade is not None
        self._can_capture = limits.can_capture and backend.can_capture(layers[0])
        sizes = ladder(limits.max_num_seqs) if self._can_capture else []
        self._graphs = DecodeGraphs(sizes, limits, self._last_tokens)
        self._pieces: PiecewiseGraphs | None = None
        if isinstance(backend, GpuBackend):
            self._pieces = PiecewiseGraphs(Parts(model, backend, layers, self._last_tokens))
        self._newest: LaunchedStep | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what a step may need that no graph contains. Touches no memory of the cache."""
        for layer in {layer.window: layer for layer in self._layers}.values():
            self._backend.warm_up(layer, self._max_num_seqs)
        self._warm_up_sampling()

    @torch.inference_mode()
    def capture(self, max_tokens: int) -> None:
        """Capture the graphs. Needs no memory of the cache: padding is not stored. max_tokens: of a step."""
        pool = torch.cuda.graph_pool_handle()
        if self._can_capture:
            self._graphs.capture(self.model, self._backend, self._layers, pool)
        if self._pieces is not None:
            self._pieces.capture(max_tokens, pool)

    def _warm_up_sampling(self) -> None:
        """For as many samples as a step can have: compiles kernels, and takes the memory before the cache does."""
        if not self.model.vocab_size:
            return
        drawn = Sequence(array("q", [0]), 1, SamplingParams(top_k=2, top_p=0.9, min_p=0.1), frozenset(), 0)
        plan = plan_sampling([drawn.next_token(1)] * self._max_num_seqs, self.model.vocab_size)
        bits = torch.full((self._max_num_seqs, -(-self.model.vocab_size // 32)), -1, dtype=torch.int32)
        plan = replace(plan, masks=TokenMasks(torch.arange(len(bits)), lambda: to_device(bits, self._device)))
        logits = self.model.head.weight.new_zeros((self._max_num_seqs, self.model.vocab_size))
        sample(logits, to_device(plan, self._device), self.model.ops)

    @torch.inference_mode()
    def launch(self, out: SchedulerOutput, sequences: SequenceTable) -> LaunchedStep:
        """Start a step, whose memory is mapped. Returns before the device is done.

        Waits for the step before it only where sampling reads tokens on the host: first, for bad words and logits
        processors; once the model is launched, for grammars, whose masks are computed while it runs.
        """
        began_s, chunks = time.perf_counter(), out.chunks
        self._wait_for_host_tokens(chunks, sequences)
        address = self._cache.address(chunks)
        plan = self._plan_sampling(chunks, address.slots, sequences)
        started = _mark()
        groups = out.prefix_groups if self._cascades else ()
        compute = self._prepare(chunks, address, sequences, plan, groups)
        prepare_inputs_s = time.perf_counter() - began_s
        launched = LaunchedStep(out, compute(), plan, sequences, started, prepare_inputs_s)
        self._cache.prefetch(chunks)
        self._newest = launched
        return launched

    def wait(self) -> None:
        """Wait for every launched step, also where launch() raised before it returned a future."""
        torch.cuda.synchronize(self._device)

    def _wait_for_host_tokens(self, chunks: Many[Chunk], sequences: SequenceTable) -> None:
        if any(sequences[chunk.request_id].params.needs_host_tokens for chunk in chunks if chunk.samples):
            self._wait_for_tokens()

    def _wait_for_tokens(self) -> None:
        if self._newest is not None:
            self._newest.result()

    def _plan_sampling(self, chunks: Many[Chunk], slots: Many[int], sequences: SequenceTable) -> SamplingPlan | None:
        plan = super()._plan_sampling(chunks, slots, sequences)
        return None if plan is None else with_last_tokens(plan, self._last_tokens)

    def _prepare(
        self, chunks: Many[Chunk], address: Address, sequences: SequenceTable, plan: SamplingPlan | None,
        groups: tuple[PrefixGroup, ...],
    ) -> Callable[[], Sampled | None]:  # fmt: skip
        """The step, ready to be started."""
        slots, graph = address.slots, self._graph_for(chunks, cascades=bool(groups))
        if graph is not None:
            token_ids = sequences.tokens(chunks, slots)
            return lambda: self._replay(graph, chunks, address, token_ids, plan, groups)
        inputs = self._inputs(chunks, slots, sequences, plan)
        metadata = self._backend.plan(replace(inputs.batch, groups=groups), address)
        return lambda: self._compute(inputs, metadata, plan)

    def _replay(
        self, graph: DecodeGraph, chunks: Many[Chunk], address: Address, token_ids: Many[int],
        plan: SamplingPlan | None, groups: Many[PrefixGroup],
    ) -> Sampled:  # fmt: skip
        """Where there is a plan, what it samples after the graph replaces the graph's argmax."""
        replayed = graph.replay(chunks, address, token_ids, address.slots, groups)
        if plan is None:
            return Sampled(replayed.tokens)
        return self._sample_into(replayed.logits, replayed.slots, plan)

    def _compute(self, inputs: _Inputs, metadata: Metadata, plan: SamplingPlan | None) -> Sampled | None:
        logits = self._logits(inputs.batch, metadata)
        return self._sample_into(logits, inputs.sample_slots, plan) if len(logits) else None

    def _logits(self, batch: Batch, metadata: Metadata) -> Tensor:
        """See Decoder."""
        num_tokens = len(batch.token_ids)
        graph = None if self._pieces is None else self._pieces.for_tokens(num_tokens)
        if graph is None:
            return self.model(batch, self._layers, metadata, self._last_tokens)
        stream = graph.run(batch, metadata)
        return self.model.logits(stream, slice(num_tokens) if batch.sample_indices is None else batch.sample_indices)

    def _sample_into(self, logits: Tensor, slots: Tensor, plan: SamplingPlan | None) -> Sampled:
        """logits: [S, vocab_size], then of prompt tokens; slots: [S], whose last tokens become the sampled ones."""
        if plan is None:
            return Sampled(self.model.ops.argmax_into(logits, slots, self._last_tokens))
        sampled = sample(logits, plan, self.model.ops)
        self._last_tokens[slots] = sampled.token_ids.clamp(min=0)
        return sampled

    def _graph_for(self, chunks: Many[Chunk], *, cascades: bool) -> DecodeGraph | None:
        is_decode = all(_is_decode(chunk) for chunk in chunks)
        return self._graphs.for_batch(len(chunks), cascades=cascades) if is_decode else None

    def _inputs(
        self, chunks: Many[Chunk], slots: Many[int], sequences: SequenceTable, plan: SamplingPlan | None
    ) -> _Inputs:
        sample_slots = [slot for chunk, slot in zip(chunks, slots, strict=True) if chunk.samples]
        return to_device(_Inputs(make_batch(chunks, slots, sequences, plan), int32(sample_slots)), self._device)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _is_decode(chunk: Chunk) -> bool:
    return chunk.num_tokens == 1 and chunk.samples
