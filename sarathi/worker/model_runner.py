"""One step on one device: chunks to tensors, the model, the sampler; knows no queues and not how memory is managed."""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sarathi.messages import Chunk, CompletedStep, HostTimes, SampledToken, SchedulerOutput, StepResult
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.ops import create_ops
from sarathi.model_executor.sampling.plan import SamplingPlan, plan_sampling
from sarathi.model_executor.sampling.sampler import Sampled, sample
from sarathi.worker.sequences import SequenceTable
from sarathi.worker.transfer import to_device


class KVCache(Protocol):
    """The cache as a step sees it: memory for the chunks is there already."""

    def address(self, chunks: Sequence[Chunk]) -> Address:
        """Where the chunks' tokens lie, in the order of the chunks."""

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """Starts to map what the next step will need; returns at once."""


class ModelRunner:
    """Eager steps, each complete when launch() returns."""

    max_in_flight = 1

    def __init__(self, model: Decoder, backend: AttentionBackend, cache: KVCache, layers: Sequence[CacheLayer]) -> None:
        self.model, self._backend, self._cache, self._layers = model, backend, cache, layers
        self._device = model.embedding.weight.device
        self._vocab_size = model.embedding.weight.shape[0]
        self._kernels = create_ops(self._device)

    @torch.inference_mode()
    def launch(self, out: SchedulerOutput, sequences: SequenceTable) -> CompletedStep:
        """Computes the chunks, whose memory is prepared, and appends what is sampled to `sequences`."""
        began_s, chunks = time.perf_counter(), out.chunks
        batch = make_batch(chunks, sequences, self._device, self.model.rotary.frequencies.rope.depends_on_length)
        sampling = [chunk.request_id for chunk in chunks if chunk.samples]
        next_tokens = [
            sequences[chunk.request_id].next_token(chunk.start + chunk.num_tokens) for chunk in chunks if chunk.samples
        ]
        plan = to_device(plan_sampling(next_tokens, self._vocab_size), self._device)
        metadata = self._backend.plan(batch, self._cache.address(chunks))
        self._cache.prefetch(chunks)
        started_s = time.perf_counter()
        logits = self.model(batch, self._layers, metadata)
        done_s = time.perf_counter()
        tokens = tuple(read_sampled(sampling, sample(logits, plan, self._kernels), plan)) if sampling else ()
        sequences.append(tokens)
        host = HostTimes(started_s - began_s, time.perf_counter() - done_s)
        return CompletedStep(StepResult(out.step_id, tokens, done_s - started_s, host=host))

    def wait(self) -> None:
        """Nothing is under way."""


def make_batch(
    chunks: Sequence[Chunk], sequences: SequenceTable, device: torch.device, with_rope_lengths: bool = False
) -> Batch:
    """Tensors of the chunks' tokens, in order."""
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    for chunk in chunks:
        end = chunk.start + chunk.num_tokens
        token_ids.extend(sequences[chunk.request_id].token_ids[chunk.start : end])
        positions.extend(range(chunk.start, end))
        if chunk.samples:
            rows.append(len(token_ids) - 1)
    sampled_rows = None if len(rows) == len(token_ids) else _indices(rows, device)
    lengths = _indices(_rope_lengths(chunks, sequences), device) if with_rope_lengths else None
    return Batch(tuple(chunks), _indices(token_ids, device), _indices(positions, device), sampled_rows, lengths)


def _rope_lengths(chunks: Sequence[Chunk], sequences: SequenceTable) -> list[int]:
    return [
        max(sequences[chunk.request_id].num_prompt_tokens, position + 1)
        for chunk in chunks
        for position in range(chunk.start, chunk.start + chunk.num_tokens)
    ]


def _indices(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def read_sampled(request_ids: Sequence[str], sampled: Sampled, plan: SamplingPlan | None) -> Iterator[SampledToken]:
    """One token for each request; waits for tensors on a device. plan: None where no more was asked for."""
    token_ids = sampled.token_ids.tolist()
    if plan is None or plan.logprobs is None or sampled.logprobs is None:
        yield from map(SampledToken, request_ids, token_ids)
        return
    chosen, top = sampled.logprobs.chosen.tolist(), sampled.logprobs.top.tolist()
    top_token_ids = sampled.logprobs.top_token_ids.tolist()
    of_row = iter(zip(chosen, top_token_ids, top, strict=True))
    for request_id, token_id, count in zip(request_ids, token_ids, plan.logprobs.counts, strict=True):
        if count is None:
            yield SampledToken(request_id, token_id)
        else:
            logprob, ids, values = next(of_row)
            yield SampledToken(request_id, token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
