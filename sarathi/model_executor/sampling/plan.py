"""Plans the sampling of a step on the host, as tensors, before the logits exist. None means nothing to do.

The last token of a request may not be known on the host yet; only penalties need it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from sarathi.model_executor.ops.types import resolve
from sarathi.model_executor.sampling.logprobs import PromptRows, PromptSpan, plan_prompt_rows
from sarathi.sampling_params import SamplingParams


class NextToken(NamedTuple):
    """The sampler's input for one row of logits.

    num_output_tokens: of the request, before this token.
    uniform: random number in [0, 1) that decides this token; not used if params are greedy.
    tokens: those before this token that sampling reads: prompt and output with a repetition penalty, bad words or
        logits processors, the output with only a presence or frequency penalty, none otherwise. The last may be a
        placeholder, see `placeholder_token`, unless params.needs_host_tokens.
    """

    params: SamplingParams
    eos_token_ids: frozenset[int]
    num_output_tokens: int
    uniform: float
    tokens: array[int]


@dataclass(frozen=True, slots=True)
class Additions:
    """values [N] are added to the logits at (rows [N], token_ids [N]): biases; -inf for bad words and early ends."""

    rows: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Occurrences:
    """Token ids of P rows: token_ids [N], concatenated over the rows; counts [P] of them per row."""

    counts: Tensor
    token_ids: Tensor


@dataclass(frozen=True, slots=True)
class Allowed:
    """`chosen` [A]: rows with allowed_token_ids; `tokens`: these tokens."""

    chosen: Tensor
    tokens: Occurrences


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """`chosen` [A]: rows with a grammar.

    bits: their masks, [A, ceil(vocab_size / 32)] int32 on the device of the logits: bit i of word w is set where token
    32 * w + i may be chosen. Called after the model was launched: waits for the tokens of the previous step.
    """

    chosen: Tensor
    bits: Callable[[], Tensor]


class Processing(NamedTuple):
    """Functions of one request that change its row of logits."""

    row: int
    functions: Sequence[Callable[..., Tensor]]
    prompt_token_ids: list[int]
    output_token_ids: list[int]


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
    """`chosen` [R]: rows that are not greedy; all else is [R, 1]. A filter is None if no row uses it.

    uniform: float64 in [0, 1). top_k: int64, the vocabulary's size in rows that do not use it; max_top_k: the
    largest in use, or 0. temperature, top_p, log_min_p: float32.
    """

    chosen: Tensor
    uniform: Tensor
    temperature: Tensor
    top_k: Tensor | None
    max_top_k: int
    top_p: Tensor | None
    log_min_p: Tensor | None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """`chosen` [L]: rows with logprobs; counts[i]: how many for row i of S (None: no logprobs)."""

    chosen: Tensor
    counts: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Sampling of all S rows of a step. All fields None or empty: one argmax."""

    processing: tuple[Processing, ...]
    allowed: Allowed | None
    additions: Additions | None
    penalties: Penalties | None
    draws: Draws | None
    logprobs: Logprobs | None
    prompt: PromptRows | None = None
    masks: TokenMasks | None = None


def plan_sampling(rows: Sequence[NextToken], vocab_size: int, prompt_spans: Sequence[PromptSpan] = ()) -> SamplingPlan:
    """The plan for S rows of logits and those of the prompts' tokens, in CPU tensors; `with_last_tokens` completes it
    on the device."""
    return SamplingPlan(
        tuple(_processing(index, row) for index, row in enumerate(rows) if row.params.logits_processors),
        _allowed(rows),
        _additions(rows, vocab_size),
        _penalties(rows),
        _draws(rows, vocab_size),
        _logprobs(rows, vocab_size),
        plan_prompt_rows(prompt_spans),
    )


def _processing(index: int, row: NextToken) -> Processing:
    num_prompt_tokens = len(row.tokens) - row.num_output_tokens
    prompt, output = row.tokens[:num_prompt_tokens], row.tokens[num_prompt_tokens:]
    return Processing(index, row.params.logits_processors, list(prompt), list(output))


def _allowed(rows: Sequence[NextToken]) -> Allowed | None:
    chosen = [index for index, row in enumerate(rows) if row.params.allowed_token_ids is not None]
    if not chosen:
        return None
    return Allowed(
        torch.tensor(chosen), _occurrences([array("q", rows[index].params.allowed_token_ids or ()) for index in chosen])
    )


def with_last_tokens(plan: SamplingPlan, last_tokens: Tensor) -> SamplingPlan:
    """The plan with placeholder tokens replaced; last_tokens: [slots] int64."""
    if plan.penalties is None:
        return plan
    in_output, in_all = (
        replace(each, token_ids=resolve(each.token_ids, last_tokens))
        for each in (plan.penalties.in_output, plan.penalties.in_all)
    )
    return replace(plan, penalties=replace(plan.penalties, in_output=in_output, in_all=in_all))


def _additions(rows: Sequence[NextToken], vocab_size: int) -> Additions | None:
    entries = [
        (index, token_id, value)
        for index, row in enumerate(rows)
        if row.params.logit_bias or row.params.min_tokens or row.params.bad_words
        for token_id, value in _added(row).items()
        if 0 <= token_id < vocab_size
    ]
    if not entries:
        return None
    indices, token_ids, values = zip(*entries, strict=True)
    return Additions(torch.tensor(indices), torch.tensor(token_ids), _floats(values))


def _added(row: NextToken) -> dict[int, float]:
    params = row.params
    added = dict(params.logit_bias or {})
    if row.num_output_tokens < params.min_tokens:
        ends = () if params.ignore_eos else row.eos_token_ids
        added.update(dict.fromkeys((*params.stop_token_ids, *ends), -math.inf))
    output = row.tokens[len(row.tokens) - row.num_output_tokens :] if params.bad_words else ()
    bad_words = cast("Sequence[Sequence[int]]", params.bad_words)  # text has become token ids
    added.update((word[-1], -math.inf) for word in bad_words if _ends_with(output, word[:-1]))
    return added


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(tokens) >= len(end) and list(tokens[len(tokens) - len(end) :]) == list(end)


def counts_all(params: SamplingParams) -> bool:
    """Whether prompt and output tokens change later logits."""
    return params.repetition_penalty != 1.0


def counts_output(params: SamplingParams) -> bool:
    """Whether output tokens change later logits by their number."""
    return bool(params.presence_penalty or params.frequency_penalty)


def _penalties(rows: Sequence[NextToken]) -> Penalties | None:
    chosen = [index for index, row in enumerate(rows) if counts_all(row.params) or counts_output(row.params)]
    if not chosen:
        return None
    penalised = [rows[index] for index in chosen]
    params = [row.params for row in penalised]
    return Penalties(
        torch.tensor(chosen),
        _column([each.presence_penalty for each in params]),
        _column([each.frequency_penalty for each in params]),
        _column([each.repetition_penalty for each in params]),
        _occurrences([row.tokens[_first_output(row) :] for row in penalised]),
        _occurrences([row.tokens if counts_all(row.params) else row.tokens[:0] for row in penalised]),
    )


def _first_output(row: NextToken) -> int:
    """Index of the first token that presence and frequency penalties count."""
    return len(row.tokens) - (row.num_output_tokens if counts_output(row.params) else 0)


def _occurrences(token_ids: Sequence[array[int]]) -> Occurrences:
    flat = array("q")
    for tokens in token_ids:
        flat += tokens
    occurred = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
    return Occurrences(torch.tensor([len(tokens) for tokens in token_ids]), occurred)


def _draws(rows: Sequence[NextToken], vocab_size: int) -> Draws | None:
    chosen = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if not chosen:
        return None
    params = [rows[index].params for index in chosen]
    uniform = [rows[index].uniform for index in chosen]
    kept = [min(each.top_k, vocab_size) if each.top_k > 0 else vocab_size for each in params]
    max_top_k = max((count for count in kept if count < vocab_size), default=0)
    with_top_p = any(each.top_p < 1.0 for each in params)
    with_min_p = any(each.min_p > 0.0 for each in params)
    return Draws(
        torch.tensor(chosen),
        torch.tensor(uniform, dtype=torch.float64).unsqueeze(1),
        _column([each.temperature for each in params]),
        torch.tensor(kept).unsqueeze(1) if max_top_k else None,
        max_top_k,
        _column([each.top_p for each in params]) if with_top_p else None,
        _column([each.min_p for each in params]).log() if with_min_p else None,
    )


def _logprobs(rows: Sequence[NextToken], vocab_size: int) -> Logprobs | None:
    wanted = [row.params.logprobs for row in rows]
    chosen = [index for index, count in enumerate(wanted) if count is not None]
    if not chosen:
        return None
    counts = tuple(None if count is None else min(count, vocab_size) for count in wanted)
    return Logprobs(torch.tensor(chosen), counts)


def _floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _column(values: Sequence[float]) -> Tensor:
    return _floats(values).unsqueeze(1)
