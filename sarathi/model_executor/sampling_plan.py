"""What a step's sampling needs as tensors, made before the logits exist; knows no logits. None: nothing to do."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from sarathi.model_executor.sequences import Sequence
from sarathi.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Additions:
    """values [N] are added to the logits of (rows [N], token_ids [N]): biases, and -inf for ends that are too early."""

    rows: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Occurrences:
    """(rows [N], token_ids [N]) of tokens that have occurred; rows count the penalised sequences."""

    rows: Tensor
    token_ids: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """`chosen` [P] are the penalised rows; presence, frequency, repetition are [P, 1] float32."""

    chosen: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    in_output: Occurrences
    in_all: Occurrences


@dataclass(frozen=True, slots=True)
class Draws:
    """`chosen` [R] are the rows that are drawn; all else is [R, 1]. A filter is None where no row uses it.

    uniform: float64 in [0, 1). top_k: int64. temperature, top_p, log_min_p: float32.
    """

    chosen: Tensor
    uniform: Tensor
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    log_min_p: Tensor | None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """`chosen` [L] are the rows whose logprobs are wanted, counts[i] of them for row i of S (None: not wanted)."""

    chosen: Tensor
    counts: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """All of a step; with nothing but Nones it is one argmax."""

    additions: Additions | None
    penalties: Penalties | None
    draws: Draws | None
    logprobs: Logprobs | None


def plan_sampling(sequences: Many[Sequence], vocab_size: int, device: torch.device) -> SamplingPlan:
    """The plan for S sequences in the order of their logits' rows."""
    return SamplingPlan(
        _additions(sequences, vocab_size, device),
        _penalties(sequences, device),
        _draws(sequences, vocab_size, device),
        _logprobs(sequences, vocab_size, device),
    )


def _additions(sequences: Many[Sequence], vocab_size: int, device: torch.device) -> Additions | None:
    entries = [
        (row, token_id, value)
        for row, sequence in enumerate(sequences)
        if sequence.params.logit_bias or sequence.params.min_tokens
        for token_id, value in _added(sequence).items()
        if 0 <= token_id < vocab_size
    ]
    if not entries:
        return None
    rows, token_ids, values = zip(*entries, strict=True)
    return Additions(
        torch.tensor(rows, device=device), torch.tensor(token_ids, device=device), _floats(values, device)
    )  # fmt: skip


def _added(sequence: Sequence) -> dict[int, float]:
    params = sequence.params
    added = dict(params.logit_bias or {})
    if sequence.num_output_tokens < params.min_tokens:
        ends = () if params.ignore_eos else sequence.eos_token_ids
        added.update(dict.fromkeys((*params.stop_token_ids, *ends), float("-inf")))
    return added


def _is_penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _penalties(sequences: Many[Sequence], device: torch.device) -> Penalties | None:
    chosen = [row for row, sequence in enumerate(sequences) if _is_penalised(sequence.params)]
    if not chosen:
        return None
    penalised = [sequences[row] for row in chosen]
    params = [sequence.params for sequence in penalised]
    outputs = [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in penalised]
    return Penalties(
        torch.tensor(chosen, device=device),
        _column([each.presence_penalty for each in params], device),
        _column([each.frequency_penalty for each in params], device),
        _column([each.repetition_penalty for each in params], device),
        _occurrences(outputs, device),
        _occurrences([sequence.token_ids for sequence in penalised], device),
    )


def _occurrences(token_ids: Many[list[int]], device: torch.device) -> Occurrences:
    rows = [row for row, tokens in enumerate(token_ids) for _ in tokens]
    flat = [token for tokens in token_ids for token in tokens]
    return Occurrences(
        torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(flat, dtype=torch.int64, device=device)
    )


def _draws(sequences: Many[Sequence], vocab_size: int, device: torch.device) -> Draws | None:
    chosen = [row for row, sequence in enumerate(sequences) if not sequence.params.is_greedy]
    if not chosen:
        return None
    params = [sequences[row].params for row in chosen]
    kept = [min(each.top_k, vocab_size) if each.top_k > 0 else vocab_size for each in params]
    with_top_k = any(count < vocab_size for count in kept)
    with_top_p = any(each.top_p < 1.0 for each in params)
    with_min_p = any(each.min_p > 0.0 for each in params)
    return Draws(
        torch.tensor(chosen, device=device),
        torch.tensor([[sequences[row].uniform()] for row in chosen], dtype=torch.float64, device=device),
        _column([each.temperature for each in params], device),
        torch.tensor(kept, device=device).unsqueeze(1) if with_top_k else None,
        _column([each.top_p for each in params], device) if with_top_p else None,
        _column([each.min_p for each in params], device).log() if with_min_p else None,
    )


def _logprobs(sequences: Many[Sequence], vocab_size: int, device: torch.device) -> Logprobs | None:
    wanted = [sequence.params.logprobs for sequence in sequences]
    chosen = [row for row, count in enumerate(wanted) if count is not None]
    if not chosen:
        return None
    counts = tuple(None if count is None else min(count, vocab_size) for count in wanted)
    return Logprobs(torch.tensor(chosen, device=device), counts)


def _floats(values: Many[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _column(values: Many[float], device: torch.device) -> Tensor:
    return _floats(values, device).unsqueeze(1)
