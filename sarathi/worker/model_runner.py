"""Model runner of the CPU, and what it shares with the CUDA runner: inputs, sampling, results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sarathi.messages import (
    Chunk,
    CompletedStep,
    HostTimes,
    PromptLogprobs,
    SampledToken,
    SchedulerOutput,
    StepFuture,
    StepResult,
)
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.sampling.logprobs import read_logprobs, read_prompt_logprobs
from sarathi.model_executor.sampling.plan import SamplingPlan, TokenMasks, plan_sampling
from sarathi.model_executor.sampling.sampler import Sampled, sample
from sarathi.worker.sequences import SequenceTable
from sarathi.worker.transfer import to_device


class KVCache(Protocol):
    """The cache of a step: memory for its chunks is mapped."""

    def address(self, chunks: Sequence[Chunk]) -> Address:
        """Where the chunks' tokens are, in the order of the chunks."""

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """Start to map what the next step will need. Returns at once."""


class PreparedStep(NamedTuple):
    """A step's inputs, and the seconds that they took."""

    out: SchedulerOutput
    batch: Batch
    metadata: Metadata
    plan: SamplingPlan | None
    prepare_inputs_s: float


class ModelRunner:
    """Runs each step to its end before launch() returns."""

    max_in_flight = 1

    def __init__(self, model: Decoder, backend: AttentionBackend, cache: KVCache, layers: Sequence[CacheLayer]) -> None:
        self.model, self._backend, self._cache, self._layers = model, backend, cache, layers
        self._device = model.place.device

    def launch(self, out: SchedulerOutput, sequences: SequenceTable) -> StepFuture:
        """Compute the chunks, whose memory is mapped, and append what is sampled to `sequences`."""
        result = self._compute_step(self._prepare_step(out, sequences))
        sequences.append(result.tokens)
        return CompletedStep(result)

    def wait(self) -> None:
        """No step is running."""

    @torch.inference_mode()
    def _prepare_step(self, out: SchedulerOutput, sequences: SequenceTable) -> PreparedStep:
        began_s, chunks = time.perf_counter(), out.chunks
        address = self._cache.address(chunks)
        plan = self._plan_sampling(chunks, address.slots, sequences)
        batch = make_batch(chunks, address.slots, sequences, with_rope_lengths=self.model.needs_rope_lengths)
        metadata = self._backend.plan(batch, address)
        self._cache.prefetch(chunks)
        return PreparedStep(out, batch, metadata, plan, time.perf_counter() - began_s)

    @torch.inference_mode()
    def _compute_step(self, step: PreparedStep) -> StepResult:
        started_s = time.perf_counter()
        logits = self.model(step.batch, self._layers, step.metadata)
        done_s = time.perf_counter()
        tokens, prompts = read_outputs(step.out.chunks, self._sample(logits, step.plan), step.plan)
        host = HostTimes(step.prepare_inputs_s, time.perf_counter() - done_s)
        return StepResult(step.out.step_id, tokens, done_s - started_s, host=host, prompt_logprobs=prompts)

    def _plan_sampling(
        self, chunks: Sequence[Chunk], slots: Sequence[int], sequences: SequenceTable
    ) -> SamplingPlan | None:
        """On the device; None where every sampled token is an argmax and nothing else is asked for, or none is made."""
        if not self.model.vocab_size or all(sequences[chunk.request_id].params.is_plain for chunk in chunks):
            return None
        tokens = [
            sequences[chunk.request_id].next_token(chunk.start + chunk.num_tokens, slot)
            for chunk, slot in zip(chunks, slots, strict=True)
            if chunk.samples
        ]
        spans = [sequences[chunk.request_id].prompt_span(chunk) for chunk in chunks]
        asked = [span for span in spans if span is not None]
        plan = plan_sampling(tokens, self.model.vocab_size, asked)
        return to_device(replace(plan, masks=self._token_masks(chunks, sequences)), self._device)

    def _token_masks(self, chunks: Sequence[Chunk], sequences: SequenceTable) -> TokenMasks | None:
        sampling = [chunk for chunk in chunks if chunk.samples]
        rows = [row for row, chunk in enumerate(sampling) if sequences[chunk.request_id].grammar is not None]
        if not rows:
            return None

        def bits() -> Tensor:
            limited = [sequences[sampling[row].request_id] for row in rows]
            ends = [sampling[row].start + sampling[row].num_tokens for row in rows]
            if any(len(sequence.token_ids) < end for sequence, end in zip(limited, ends, strict=True)):
                self._wait_for_tokens()
            return to_device(sequences.token_masks(limited), self._device)

        return TokenMasks(torch.tensor(rows), bits)

    def _wait_for_tokens(self) -> None:
        """Return when the tokens of the step before the one that is being launched are in the sequences."""

    def _sample(self, logits: Tensor, plan: SamplingPlan | None) -> Sampled:
        """logits: [S, vocab_size], then those of the plan's prompt tokens."""
        return Sampled(self.model.ops.argmax(logits), None) if plan is None else sample(logits, plan, self.model.ops)


def make_batch(
    chunks: Sequence[Chunk], slots: Sequence[int], sequences: SequenceTable, *, with_rope_lengths: bool = False
) -> Batch:
    """Tensors of the chunks' tokens, in order: int32, on the CPU."""
    positions: list[int] = []
    sample_indices: list[int] = []
    prompt_indices: list[int] = []
    for chunk in chunks:
        first = len(positions)
        positions.extend(range(chunk.start, chunk.start + chunk.num_tokens))
        if chunk.samples:
            sample_indices.append(len(positions) - 1)
        if (span := sequences[chunk.request_id].prompt_span(chunk)) is not None:
            prompt_indices.extend(range(first, first + len(span.token_ids)))
    is_every_token = len(sample_indices) == len(positions) and not prompt_indices
    return Batch(
        tuple(chunks),
        int32(sequences.tokens(chunks, slots)),
        int32(positions),
        None if is_every_token else int32([*sample_indices, *prompt_indices]),
        int32(_rope_lengths(chunks, sequences)) if with_rope_lengths else None,
    )


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _rope_lengths(chunks: Sequence[Chunk], sequences: SequenceTable) -> list[int]:
    return [
        max(sequences[chunk.request_id].num_prompt_tokens, position + 1)
        for chunk in chunks
        for position in range(chunk.start, chunk.start + chunk.num_tokens)
    ]


def read_outputs(
    chunks: Sequence[Chunk], sampled: Sampled | None, plan: SamplingPlan | None
) -> tuple[tuple[SampledToken, ...], tuple[PromptLogprobs, ...]]:
    """A token for each chunk that samples, and log probabilities of prompt tokens, where the plan asks for them.

    Waits for tensors on a device. plan: see `_plan_sampling`.
    """
    if sampled is None:
        return (), ()
    tokens = tuple(_read_tokens(chunks, sampled, plan))
    if sampled.errors:
        tokens = tuple(token._replace(error=sampled.errors.get(row)) for row, token in enumerate(tokens))
    if plan is None or plan.prompt is None or sampled.prompt is None:
        return tokens, ()
    return tokens, tuple(read_prompt_logprobs(sampled.prompt, plan.prompt))


def _read_tokens(chunks: Sequence[Chunk], sampled: Sampled, plan: SamplingPlan | None) -> Iterator[SampledToken]:
    request_ids = [chunk.request_id for chunk in chunks if chunk.samples]
    token_ids = sampled.token_ids.tolist()
    if plan is None or plan.logprobs is None or sampled.logprobs is None:
        yield from map(SampledToken, request_ids, token_ids)
        return
    of_row = read_logprobs(sampled.logprobs)
    for request_id, token_id, count in zip(request_ids, token_ids, plan.logprobs.counts, strict=True):
        if count is None:
            yield SampledToken(request_id, token_id)
        else:
            logprob, ids, values = next(of_row)
            yield SampledToken(request_id, token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
