"""Model runner of the CPU, and what it shares with the CUDA runner: inputs, sampling, results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
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
from sarathi.model_executor.sampling.logprobs import TopLogprobs, read_logprobs, read_prompt_logprobs
from sarathi.model_executor.sampling.plan import SamplingPlan, TokenMasks, plan_sampling
from sarathi.model_executor.sampling.sampler import Sampled, sample
from sarathi.worker.sequences import SequenceTable
from sarathi.worker.transfer import to_device

int32 = partial(torch.tensor, dtype=torch.int32)


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
        batch = make_batch(chunks, address.slots, sequences, plan, with_rope_lengths=self.model.needs_rope_lengths)
        metadata = self._backend.plan(batch, address)
        self._cache.prefetch(chunks)
        return PreparedStep(out, batch, metadata, plan, time.perf_counter() - began_s)

    @torch.inference_mode()
    def _compute_step(self, step: PreparedStep) -> StepResult:
        started_s = time.perf_counter()
        logits = self.model(step.batch, self._layers, step.metadata)
        done_s = time.perf_counter()
        plan, ops = step.plan, self.model.ops
        sampled = Sampled(ops.argmax(logits)) if plan is None else sample(logits, plan, ops)
        tokens, prompts = read_outputs(step.out.chunks, sampled, plan)
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


def make_batch(
    chunks: Sequence[Chunk], slots: Sequence[int], sequences: SequenceTable, plan: SamplingPlan | None = None,
    *, with_rope_lengths: bool = False,
) -> Batch:  # fmt: skip
    """Tensors of the chunks' tokens, in order: int32, on the CPU. plan: see `_plan_sampling`."""
    spans = () if plan is None or plan.prompt is None else plan.prompt.spans
    num_spanned = {span.request_id: len(span.token_ids) for span in spans}
    positions: list[int] = []
    sample_indices: list[int] = []
    prompt_indices: list[int] = []
    for chunk in chunks:
        first = len(positions)
        positions.extend(range(chunk.start, chunk.start + chunk.num_tokens))
        if chunk.samples:
            sample_indices.append(len(positions) - 1)
        prompt_indices.extend(range(first, first + num_spanned.get(chunk.request_id, 0)))
    is_every_token = len(sample_indices) == len(positions) and not prompt_indices
    return Batch(
        tuple(chunks),
        int32(sequences.tokens(chunks, slots)),
        int32(positions),
        None if is_every_token else int32([*sample_indices, *prompt_indices]),
        int32(_rope_lengths(chunks, sequences)) if with_rope_lengths else None,
    )


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
    request_ids = [chunk.request_id for chunk in chunks if chunk.samples]
    tokens = tuple(map(SampledToken, request_ids, sampled.token_ids.tolist()))
    if plan is None:
        return tokens, ()
    if plan.logprobs is not None and sampled.logprobs is not None:
        tokens = tuple(_with_logprobs(tokens, sampled.logprobs, plan.logprobs.counts))
    if sampled.errors:
        tokens = tuple(token._replace(error=sampled.errors.get(row)) for row, token in enumerate(tokens))
    if plan.prompt is None or sampled.prompt is None:
        return tokens, ()
    return tokens, tuple(read_prompt_logprobs(sampled.prompt, plan.prompt))


def _with_logprobs(
    tokens: Sequence[SampledToken], found: TopLogprobs, counts: Sequence[int | None]
) -> Iterator[SampledToken]:
    of_row = read_logprobs(found)
    for token, count in zip(tokens, counts, strict=True):
        if count is None:
            yield token
        else:
            logprob, ids, values = next(of_row)
            yield token._replace(logprob=logprob, top_logprobs=tuple(zip(ids[:count], values[:count], strict=True)))
