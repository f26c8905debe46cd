"""Log probabilities of sampled and prompt tokens, on the device and read by the host."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.messages import PromptLogprobs, SampledToken

_ROWS_AT_ONCE = 256  # of logits in float32: 128 MiB at a vocabulary of 128K


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """For L rows: log probability of the chosen token [L]; the k most likely tokens and theirs [L, k], best first."""

    chosen: Tensor
    top_token_ids: Tensor
    top: Tensor


class PromptSpan(NamedTuple):
    """Prompt tokens of one request from position `start` on, whose logits a step computes.

    num_top: the number of most likely tokens to return for each.
    """

    request_id: str
    start: int
    token_ids: array[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt tokens whose log probabilities a step computes: token_ids [N] int64, span by span."""

    spans: tuple[PromptSpan, ...]
    token_ids: Tensor


def plan_prompt_rows(spans: Sequence[PromptSpan]) -> PromptRows | None:
    """In CPU tensors; None if there are no spans."""
    if not spans:
        return None
    token_ids = array("q")
    for span in spans:
        token_ids += span.token_ids
    return PromptRows(tuple(spans), torch.frombuffer(token_ids, dtype=torch.int64))


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> TopLogprobs:
    """logits: [L, vocab_size] of any float dtype; token_ids: [L] int64. Computed in float32."""
    rows = logits.float().log_softmax(dim=-1)
    top = rows.topk(num_top, dim=-1)
    return TopLogprobs(rows.gather(1, token_ids.unsqueeze(1)).squeeze(1), top.indices, top.values)


def prompt_logprobs(logits: Tensor, rows: PromptRows) -> TopLogprobs:
    """logits: [N, vocab_size], from the positions before the tokens."""
    num_top = max(span.num_top for span in rows.spans)
    pieces = [
        top_logprobs(logits[first : first + _ROWS_AT_ONCE], rows.token_ids[first : first + _ROWS_AT_ONCE], num_top)
        for first in range(0, len(rows.token_ids), _ROWS_AT_ONCE)
    ]
    chosen, top_token_ids, top = (
        torch.cat([getattr(piece, name) for piece in pieces]) for name in ("chosen", "top_token_ids", "top")
    )
    return TopLogprobs(chosen, top_token_ids, top)


def read_logprobs(found: TopLogprobs) -> Iterator[tuple[float, list[int], list[float]]]:
    """One entry for each row, with the fields of TopLogprobs; waits for the device."""
    return zip(found.chosen.tolist(), found.top_token_ids.tolist(), found.top.tolist(), strict=True)


def read_prompt_logprobs(found: TopLogprobs, rows: PromptRows) -> Iterator[PromptLogprobs]:
    """One message for each span."""
    entries = read_logprobs(found)
    for request_id, start, token_ids, num_top in rows.spans:
        tokens = []
        for token_id in token_ids:
            logprob, top_ids, top = next(entries)
            best = tuple(zip(top_ids[:num_top], top[:num_top], strict=True))
            tokens.append(SampledToken(request_id, token_id, logprob, best))
        yield PromptLogprobs(request_id, start, tuple(tokens))
