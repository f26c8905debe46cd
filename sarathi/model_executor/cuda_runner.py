"""Steps on a GPU that are on their way while the next ones are made; knows no queues and not how memory is managed.

A sampled token stays on the device, where the next step reads it, and comes to the host when its Flight is asked.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.messages import Chunk, HostTimes
from sarathi.model_executor.attention.backend import Address, AttentionBackend, BlockAddress, CacheLayer, Metadata
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.decode_graphs import Capturable, DecodeGraph, DecodeGraphs, Limits, ladder
from sarathi.model_executor.model_runner import Computed, KVCache, read_sampled
from sarathi.model_executor.models.fused import FusedDecoder
from sarathi.model_executor.sampler import Sampled, sample
from sarathi.model_executor.sampling_plan import SamplingPlan, plan_sampling
from sarathi.model_executor.sequences import SequenceTable

ON_DEVICE = -1  # in place of a token id that the host does not know yet


class Flight:
    """A step on its way; result() waits for it."""

    def __init__(
        self, sampling: Sequence[str], sampled: Sampled | None, plan: SamplingPlan | None, sequences: SequenceTable,
        started: torch.cuda.Event, prepare_inputs_s: float,
    ) -> None:  # fmt: skip
        self._sampling, self._plan, self._sequences = sampling, plan, sequences
        self._sampled = None if sampled is None else Sampled(_to_host(sampled.token_ids), sampled.logprobs)
        self._started, self._done, self._prepare_inputs_s = started, _mark(), prepare_inputs_s
        self._computed: Computed | None = None

    def result(self) -> Computed:
        """The step's tokens, known to `sequences` from then on."""
        if self._computed is None:
            self._done.synchronize()
            landed_s = time.perf_counter()
            tokens = () if self._sampled is None else tuple(read_sampled(self._sampling, self._sampled, self._plan))
            self._sequences.append(tokens)
            host = HostTimes(self._prepare_inputs_s, time.perf_counter() - landed_s)
            self._computed = Computed(tokens, self._started.elapsed_time(self._done) / 1e3, host)
        return self._computed


class _Inputs(NamedTuple):
    """What a step needs beside the attention's metadata, int32 on the device."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    sampled_rows: Tensor  # [S]
    sampled_homes: Tensor  # [S]


class CudaModelRunner:
    """Decode steps as graphs where the backend allows it, others eager; one step may be in flight behind another."""

    max_in_flight = 2

    def __init__(
        self, model: FusedDecoder, backend: AttentionBackend, cache: KVCache, layers: Sequence[CacheLayer], *,
        prefetch: bool, limits: Limits,
    ) -> None:  # fmt: skip
        self.model, self._backend, self._cache, self._layers = model, backend, cache, layers
        self._prefetch = prefetch
        self._device = model.decoder.embedding.weight.device
        self._vocab_size = model.decoder.embedding.weight.shape[0]
        homes = layers[0].k.shape[0]
        self._last_tokens = torch.zeros(homes + 1, dtype=torch.int64, device=self._device)
        self._capturable = backend if isinstance(backend, Capturable) else None
        sizes = [] if self._capturable is None else ladder(limits.max_num_seqs)
        self._graphs = DecodeGraphs(sizes, lambda size: DecodeGraph(size, limits, self._last_tokens))
        self._newest: Flight | None = None

    @torch.inference_mode()
    def capture(self) -> None:
        """Makes the graphs; needs no memory in the cache, since padded rows touch none."""
        if self._capturable is not None:
            self._graphs.capture(self.model, self._capturable, self._layers)

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk], sequences: SequenceTable) -> Flight:
        """Starts a step, whose memory is prepared; returns before the device is done."""
        began_s = time.perf_counter()
        sampling = [chunk.request_id for chunk in chunks if chunk.samples]
        plan = self._plan(sampling, sequences)
        started = _mark()
        compute = self._prepare(chunks, sequences, plan)
        prepare_inputs_s = time.perf_counter() - began_s
        self._newest = Flight(sampling, compute(), plan, sequences, started, prepare_inputs_s)
        if self._prefetch:
            self._cache.prefetch(chunks)
        return self._newest

    def _plan(self, sampling: Sequence[str], sequences: SequenceTable) -> SamplingPlan | None:
        """None where all is greedy. Anything else may depend on the newest token, which is waited for."""
        if all(sequences[request_id].params.is_plain for request_id in sampling):
            return None
        if self._newest is not None:
            self._newest.result()
        return plan_sampling([sequences[request_id] for request_id in sampling], self._vocab_size, self._device)

    def _prepare(
        self, chunks: Sequence[Chunk], sequences: SequenceTable, plan: SamplingPlan | None
    ) -> Callable[[], Sampled | None]:
        """The step, ready to be started."""
        address = self._cache.address(chunks)
        graph = self._graph_for(chunks, plan)
        if graph is not None:
            newest = [_newest_token(each, sequences) for each in chunks]
            return lambda: Sampled(graph.replay(chunks, address, newest), None)
        inputs = self._inputs(chunks, address, sequences)
        metadata = self._backend.plan(Batch(tuple(chunks), inputs.token_ids, inputs.positions, None), address)
        return lambda: self._compute(inputs, metadata, plan)

    def _compute(self, inputs: _Inputs, metadata: Metadata, plan: SamplingPlan | None) -> Sampled | None:
        rows = None if len(inputs.sampled_rows) == len(inputs.token_ids) else inputs.sampled_rows
        logits = self.model(inputs.token_ids, inputs.positions, rows, self._layers, metadata)
        if not len(inputs.sampled_rows):
            return None
        sampled = Sampled(self.model.kernels.argmax(logits), None) if plan is None else sample(logits, plan)
        self._last_tokens[inputs.sampled_homes] = sampled.token_ids
        return sampled

    def _graph_for(self, chunks: Sequence[Chunk], plan: SamplingPlan | None) -> DecodeGraph | None:
        if plan is not None or not all(_is_decode(chunk) for chunk in chunks):
            return None
        return self._graphs.for_batch(len(chunks))

    def _inputs(self, chunks: Sequence[Chunk], address: Address, sequences: SequenceTable) -> _Inputs:
        """One copy to the device; tokens that are there already take their place in the batch there."""
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        owners: list[int] = []
        waiting: list[int] = []
        for index, chunk in enumerate(chunks):
            known = sequences[chunk.request_id].token_ids
            end = chunk.start + chunk.num_tokens
            token_ids.extend(known[chunk.start : end])
            if len(token_ids) < len(positions) + chunk.num_tokens:
                waiting.append(index)
                token_ids.append(0)
            positions.extend(range(chunk.start, end))
            if chunk.samples:
                rows.append(len(token_ids) - 1)
                owners.append(index)
        homes = _homes(address)
        ends = _ends(chunks)
        parts = (
            token_ids, positions, rows, [homes[index] for index in owners],
            [ends[index] for index in waiting], [homes[index] for index in waiting],
        )  # fmt: skip
        *inputs, late_rows, late_homes = self._to_device(parts)
        if waiting:
            inputs[0][late_rows] = self._last_tokens[late_homes].to(torch.int32)
        return _Inputs(*inputs)

    def _to_device(self, parts: Sequence[list[int]]) -> list[Tensor]:
        packed = torch.tensor([each for part in parts for each in part], dtype=torch.int32, pin_memory=True)
        return list(torch.split(packed.to(self._device, non_blocking=True), [len(part) for part in parts]))


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _is_decode(chunk: Chunk) -> bool:
    return chunk.num_tokens == 1 and chunk.samples


def _newest_token(chunk: Chunk, sequences: SequenceTable) -> int:
    known = sequences[chunk.request_id].token_ids
    return known[chunk.start] if chunk.start < len(known) else ON_DEVICE


def _ends(chunks: Sequence[Chunk]) -> list[int]:
    """Row of each chunk's last token."""
    ends, total = [], -1
    for chunk in chunks:
        total += chunk.num_tokens
        ends.append(total)
    return ends


def _homes(address: Address) -> Sequence[int]:
    """A number for each request that no other resident one has: its slot, or its first block."""
    return [table[0] for table in address.block_tables] if isinstance(address, BlockAddress) else address.slots


def _to_host(token_ids: Tensor) -> Tensor:
    host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
    return host.copy_(token_ids, non_blocking=True)
