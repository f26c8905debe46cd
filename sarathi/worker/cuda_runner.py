"""Steps on a GPU that are on their way while the next ones are made; knows no queues and not how memory is managed.

A sampled token stays on the device, where the next step reads it, and comes to the host when its future is asked.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from sarathi.messages import Chunk, HostTimes, SchedulerOutput, StepResult
from sarathi.model_executor.attention.address import Address, BlockAddress, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.fused import FusedDecoder
from sarathi.model_executor.sampling.plan import SamplingPlan, plan_sampling, with_last_tokens
from sarathi.model_executor.sampling.sampler import Sampled, sample
from sarathi.sampling_params import SamplingParams
from sarathi.worker.cuda_graphs import DecodeGraph, DecodeGraphs, Limits, ladder
from sarathi.worker.model_runner import KVCache, read_sampled
from sarathi.worker.sequences import Sequence, SequenceTable, token_array
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
            names = [chunk.request_id for chunk in self._out.chunks if chunk.samples]
            tokens = () if self._sampled is None else tuple(read_sampled(names, self._sampled, self._plan))
            self._sequences.append(tokens)
            host = HostTimes(self._prepare_inputs_s, time.perf_counter() - ended_s)
            model_s = self._started.elapsed_time(self._done) / 1e3
            self._outcome = StepResult(self._out.step_id, tokens, model_s, host=host)
        return self._outcome


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a step needs beside the attention's metadata, int32 on the device."""

    token_ids: Tensor  # [T], stand-ins among them
    positions: Tensor  # [T]
    sampled_rows: Tensor  # [S]
    sampled_homes: Tensor  # [S]


class CudaModelRunner:
    """Decode steps as graphs where the backend allows it, others eager; one step may be in flight behind another."""

    max_in_flight = 2

    def __init__(
        self, model: FusedDecoder, backend: AttentionBackend, cache: KVCache, layers: Many[CacheLayer],
        limits: Limits,
    ) -> None:  # fmt: skip
        self.model, self._backend, self._cache, self._layers = model, backend, cache, layers
        self._device = model.decoder.embedding.weight.device
        self._vocab_size = model.decoder.embedding.weight.shape[0]
        self._max_num_seqs = limits.max_num_seqs
        homes = layers[0].k.shape[0]
        self._last_tokens = torch.zeros(homes + 1, dtype=torch.int64, device=self._device)
        sizes = ladder(limits.max_num_seqs) if backend.can_capture(layers[0]) else []
        self._graphs = DecodeGraphs(sizes, limits, self._last_tokens)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compiles what a step may need that no graph holds; touches no memory in the cache."""
        for layer in {layer.window: layer for layer in self._layers}.values():
            self.model.backend.warm_up(layer, self._max_num_seqs)
        self._warm_up_sampling()

    @torch.inference_mode()
    def capture(self) -> None:
        """Makes the graphs; needs no memory in the cache, since padded rows touch none."""
        if self._backend.can_capture(self._layers[0]):
            self._graphs.capture(self.model, self._backend, self._layers)

    def _warm_up_sampling(self) -> None:
        """For as many rows as a step can have: to compile what it needs, and to take the memory before a cache does."""
        drawn = Sequence(token_array([0]), 1, SamplingParams(top_k=2, top_p=0.9, min_p=0.1), frozenset(), 0)
        plan = plan_sampling([drawn.next_token(1)] * self._max_num_seqs, self._vocab_size)
        logits = self.model.decoder.head.weight.new_zeros((self._max_num_seqs, self._vocab_size))
        sample(logits, to_device(plan, self._device), self.model.kernels)

    @torch.inference_mode()
    def launch(self, out: SchedulerOutput, sequences: SequenceTable) -> LaunchedStep:
        """Starts a step, whose memory is prepared; returns before the device is done, and waits for no earlier step."""
        began_s, chunks = time.perf_counter(), out.chunks
        address = self._cache.address(chunks)
        plan = self._plan(chunks, address, sequences)
        started = _mark()
        compute = self._prepare(chunks, address, sequences, plan)
        prepare_inputs_s = time.perf_counter() - began_s
        launched = LaunchedStep(out, compute(), plan, sequences, started, prepare_inputs_s)
        self._cache.prefetch(chunks)
        return launched

    def wait(self) -> None:
        """Waits for all that was started, also where launch() raised before it returned a future."""
        torch.cuda.synchronize(self._device)

    def _plan(self, chunks: Many[Chunk], address: Address, sequences: SequenceTable) -> SamplingPlan | None:
        """None where all is greedy."""
        if all(sequences[chunk.request_id].params.is_plain for chunk in chunks if chunk.samples):
            return None
        rows = [
            sequences[chunk.request_id].next_token(chunk.start + chunk.num_tokens, home)
            for chunk, home in zip(chunks, _homes(address), strict=True)
            if chunk.samples
        ]
        plan = to_device(plan_sampling(rows, self._vocab_size), self._device)
        return with_last_tokens(plan, self._last_tokens)

    def _prepare(
        self, chunks: Many[Chunk], address: Address, sequences: SequenceTable, plan: SamplingPlan | None
    ) -> Callable[[], Sampled | None]:
        """The step, ready to be started."""
        graph = self._graph_for(chunks)
        if graph is not None:
            token_ids = _tokens(chunks, address, sequences)
            return lambda: self._replay(graph, chunks, address, token_ids, plan)
        inputs = self._inputs(chunks, address, sequences)
        metadata = self._backend.plan(Batch(tuple(chunks), inputs.token_ids, inputs.positions, None), address)
        return lambda: self._compute(inputs, metadata, plan)

    def _replay(
        self, graph: DecodeGraph, chunks: Many[Chunk], address: Address, token_ids: array[int],
        plan: SamplingPlan | None,
    ) -> Sampled:  # fmt: skip
        """What a plan draws takes the place of the likeliest tokens, behind the graph."""
        replayed = graph.replay(chunks, address, token_ids, _homes(address))
        if plan is None:
            return Sampled(replayed.tokens, None)
        return self._sample(replayed.logits, replayed.homes, plan)

    def _compute(self, inputs: _Inputs, metadata: Metadata, plan: SamplingPlan | None) -> Sampled | None:
        stream = self.model.embed(inputs.token_ids, self._last_tokens)
        stream = self.model(stream, inputs.positions, self._layers, metadata)
        if not len(inputs.sampled_rows):
            return None
        if len(inputs.sampled_rows) < len(stream):
            stream = stream[inputs.sampled_rows]
        return self._sample(self.model.logits(stream), inputs.sampled_homes, plan)

    def _sample(self, logits: Tensor, homes: Tensor, plan: SamplingPlan | None) -> Sampled:
        """logits: [S, vocab_size]; homes: [S], which have the tokens from then on."""
        kernels = self.model.kernels
        if plan is None:
            return Sampled(kernels.argmax_into(logits, homes, self._last_tokens), None)
        sampled = sample(logits, plan, kernels)
        self._last_tokens[homes] = sampled.token_ids
        return sampled

    def _graph_for(self, chunks: Many[Chunk]) -> DecodeGraph | None:
        return self._graphs.for_batch(len(chunks)) if all(_is_decode(chunk) for chunk in chunks) else None

    def _inputs(self, chunks: Many[Chunk], address: Address, sequences: SequenceTable) -> _Inputs:
        positions: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            positions.extend(range(chunk.start, chunk.start + chunk.num_tokens))
            if chunk.samples:
                rows.append(len(positions) - 1)
        token_ids = _tokens(chunks, address, sequences)
        homes = [home for chunk, home in zip(chunks, _homes(address), strict=True) if chunk.samples]
        inputs = (torch.tensor(part, dtype=torch.int32) for part in (token_ids, positions, rows, homes))
        return to_device(_Inputs(*inputs), self._device)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _is_decode(chunk: Chunk) -> bool:
    return chunk.num_tokens == 1 and chunk.samples


def _tokens(chunks: Many[Chunk], address: Address, sequences: SequenceTable) -> array[int]:
    """All chunks' tokens, one chunk after the other, with stand-ins for those that the host does not know."""
    tokens = token_array()
    for chunk, home in zip(chunks, _homes(address), strict=True):
        tokens += sequences[chunk.request_id].tokens(chunk.start, chunk.start + chunk.num_tokens, home)
    return tokens


def _homes(address: Address) -> Many[int]:
    """A number for each request that no other resident one has: its slot, or its first block."""
    return [table[0] for table in address.block_tables] if isinstance(address, BlockAddress) else address.slots
