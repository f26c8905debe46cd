"""From logits to tokens, for all rows of a step at once; knows tensors and a plan, no requests.

Order, as in transformers: bias and penalties, temperature, top-k, top-p, min-p. Logprobs are of the logits given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sarathi.model_executor.sampling_plan import Additions, Draws, Penalties, SamplingPlan

_HEAD_SIZE = 1024  # how many of the likeliest tokens are sorted before all of them are


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Of L rows: the chosen token's [L], and the likeliest k tokens and theirs [L, k], best first."""

    chosen: Tensor
    top_token_ids: Tensor
    top: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_ids: [S] int64 on the logits' device; logprobs: of the plan's rows, None where no row asked."""

    token_ids: Tensor
    logprobs: SampledLogprobs | None


def sample(logits: Tensor, plan: SamplingPlan) -> Sampled:
    """logits: [S, vocab_size], left as they are. Without anything planned this is a single argmax."""
    processed = logits
    if plan.additions is not None or plan.penalties is not None:
        processed = logits.to(torch.float32, copy=True)
        _add(processed, plan.additions)
        _penalise(processed, plan.penalties)
    token_ids = processed.argmax(dim=-1)
    if plan.draws is not None:
        token_ids[plan.draws.chosen] = draw(processed[plan.draws.chosen].float(), plan.draws)
    return Sampled(token_ids, _logprobs(logits, token_ids, plan))


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """One token a row by inverting the filtered distribution; logits [R, vocab_size] are overwritten -> [R] int64."""
    probabilities = torch.softmax(filtered(logits, draws), dim=-1)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    target = draws.uniform * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)  # the first that exceeds the target
    return drawn.clamp_(max=logits.shape[-1] - 1)


def filtered(logits: Tensor, draws: Draws) -> Tensor:
    """Logits at their temperature with -inf where a filter cut; in place, [R, vocab_size] float32."""
    logits.div_(draws.temperature)
    if draws.top_k is not None:
        _cut_below(logits, _kth_largest(logits, draws.top_k))
    if draws.top_p is not None:
        _cut_below(logits, _nucleus_floor(logits, draws.top_p))
    if draws.log_min_p is not None:
        _cut_below(logits, logits.amax(dim=-1, keepdim=True) + draws.log_min_p)
    return logits


def _add(logits: Tensor, additions: Additions | None) -> None:
    if additions is not None:
        logits.index_put_((additions.rows, additions.token_ids), additions.values, accumulate=True)


def _penalise(logits: Tensor, penalties: Penalties | None) -> None:
    """Repetition counts prompt and output (Keskar et al., 2019); presence and frequency the output alone (OpenAI)."""
    if penalties is None:
        return
    rows = logits[penalties.chosen]
    seen = torch.zeros_like(rows, dtype=torch.bool)
    seen[penalties.in_all.rows, penalties.in_all.token_ids] = True
    repeated = torch.where(rows > 0, rows / penalties.repetition, rows * penalties.repetition)
    rows = torch.where(seen, repeated, rows)
    counts = torch.zeros_like(rows)
    once = torch.ones((), dtype=counts.dtype, device=counts.device)
    counts.index_put_((penalties.in_output.rows, penalties.in_output.token_ids), once, accumulate=True)
    logits[penalties.chosen] = rows - penalties.frequency * counts - penalties.presence * (counts > 0)


def _cut_below(logits: Tensor, floor: Tensor) -> None:
    logits.masked_fill_(logits < floor, float("-inf"))


def _kth_largest(logits: Tensor, k: Tensor) -> Tensor:
    """k: [R, 1] -> [R, 1]; rows without the filter ask for the smallest."""
    limited = k.masked_fill(k == logits.shape[-1], 1)
    kth = logits.topk(int(limited.max()), dim=-1).values.gather(1, limited - 1)
    return torch.where(k == logits.shape[-1], float("-inf"), kth)


def _nucleus_floor(logits: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit of the fewest likeliest tokens that together reach top_p, [R, 1] (Holtzman et al., 2020)."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    for size in (min(_HEAD_SIZE, logits.shape[-1]), logits.shape[-1]):
        largest = logits.topk(size, dim=-1).values
        probabilities = (largest - total).exp()
        reached = probabilities.cumsum(dim=-1)
        if bool((reached[:, -1:] >= top_p)[top_p < 1.0].all()):
            break
    inside = reached - probabilities < top_p  # what came before had not reached it yet
    floor = largest.masked_fill(~inside, float("inf")).amin(dim=-1, keepdim=True)
    return torch.where(top_p < 1.0, floor, float("-inf"))


def _logprobs(logits: Tensor, token_ids: Tensor, plan: SamplingPlan) -> SampledLogprobs | None:
    if plan.logprobs is None:
        return None
    rows = logits[plan.logprobs.chosen].float().log_softmax(dim=-1)
    chosen = rows.gather(1, token_ids[plan.logprobs.chosen].unsqueeze(1)).squeeze(1)
    most = max(count for count in plan.logprobs.counts if count is not None)
    top = rows.topk(most, dim=-1)
    return SampledLogprobs(chosen, top.indices, top.values)
