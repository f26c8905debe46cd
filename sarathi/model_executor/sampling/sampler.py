"""From logits to tokens, for all rows of a step at once.

Nothing here waits for the device, but for logits processors and grammars: no value is read, no shape depends on one,
and no numbers come from the host. Order: logits processors, allowed tokens, grammars, bias and bad words, penalties,
then as in transformers temperature, top-k, top-p, min-p. Logprobs are of the logits given.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sarathi.model_executor.ops import Ops
from sarathi.model_executor.sampling.logprobs import TopLogprobs, prompt_logprobs, top_logprobs
from sarathi.model_executor.sampling.plan import (
    Additions,
    Allowed,
    Draws,
    Occurrences,
    Penalties,
    Processing,
    SamplingPlan,
    TokenMasks,
)
from sarathi.wording import short_repr

_PARAMETERS_WITH_PROMPT = 3


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_ids: [S] int64 on the logits' device, -1 where logits are not finite.

    logprobs: of the plan's rows, None where no row asked.
    prompt: log probabilities of the plan's prompt tokens, None where it has none.
    """

    token_ids: Tensor
    logprobs: TopLogprobs | None = None
    prompt: TopLogprobs | None = None


def sample(logits: Tensor, plan: SamplingPlan, kernels: Ops) -> Sampled:
    """logits: [S, vocab_size], contiguous, left as they are; [N, vocab_size] of the plan's prompt tokens follow.

    Without anything planned this is a single argmax.
    """
    if plan.prompt is not None:
        num_samples = len(logits) - len(plan.prompt.token_ids)
        prompt = prompt_logprobs(logits[num_samples:], plan.prompt)
        return replace(sample(logits[:num_samples], replace(plan, prompt=None), kernels), prompt=prompt)
    if not len(logits):
        return Sampled(torch.empty(0, dtype=torch.int64, device=logits.device))
    processed = logits
    if plan.processing or plan.allowed or plan.masks or plan.additions or plan.penalties:
        processed = logits.to(torch.float32, copy=True)
        for each in plan.processing:
            _process(processed[each.row], each)
        _allow(processed, plan.allowed)
        _mask(processed, plan.masks, kernels)
        _add(processed, plan.additions)
        _penalise(processed, plan.penalties)
    token_ids = kernels.argmax(processed)
    if plan.allowed or plan.masks:  # which hide NaN and infinity of the other tokens
        token_ids.masked_fill_(kernels.argmax(logits) < 0, -1)
    if plan.draws is not None:
        chosen = plan.draws.chosen
        drawn = draw(processed[chosen].float(), plan.draws, kernels)
        token_ids[chosen] = torch.where(token_ids[chosen] < 0, -1, drawn)
    return Sampled(token_ids, _logprobs(logits, token_ids, plan))


def draw(logits: Tensor, draws: Draws, kernels: Ops) -> Tensor:
    """One token a row of the filtered distribution; logits [R, vocab_size] are overwritten -> [R] int64."""
    return kernels.draw(filtered(logits, draws, kernels), draws.uniform)


def filtered(logits: Tensor, draws: Draws, kernels: Ops) -> Tensor:
    """Logits at their temperature with -inf where a filter cut; in place, [R, vocab_size] float32."""
    logits.div_(draws.temperature)
    if draws.top_k is not None:
        _cut_below(logits, _kth_largest(logits, draws.top_k, draws.max_top_k))
    if draws.top_p is not None:
        _cut_below(logits, kernels.top_p_threshold(logits, draws.top_p))
    if draws.log_min_p is not None:
        _cut_below(logits, logits.amax(dim=-1, keepdim=True) + draws.log_min_p)
    return logits


def _process(row: Tensor, processing: Processing) -> None:
    """row: [vocab_size] float32, overwritten. A function may change the logits that it is given, or return others."""
    for function in processing.functions:
        with_prompt = len(inspect.signature(function).parameters) == _PARAMETERS_WITH_PROMPT
        prompt = (processing.prompt_token_ids,) if with_prompt else ()
        changed = function(*prompt, processing.output_token_ids, row)
        if not isinstance(changed, Tensor) or changed.shape != row.shape:
            found = list(changed.shape) if isinstance(changed, Tensor) else short_repr(changed)
            raise ValueError(f"a logits processor returned {found}: it must return logits of shape {list(row.shape)}")
        row.copy_(changed)


def _allow(logits: Tensor, allowed: Allowed | None) -> None:
    if allowed is not None:
        rows = logits[allowed.chosen]
        kept = torch.zeros_like(rows, dtype=torch.bool)
        kept.view(-1).index_fill_(0, _places(rows, allowed.tokens), True)
        logits[allowed.chosen] = rows.masked_fill(~kept, float("-inf"))


def _mask(logits: Tensor, masks: TokenMasks | None, kernels: Ops) -> None:
    if masks is not None:
        kernels.mask_tokens(logits, masks.chosen, masks.bits())


def _add(logits: Tensor, additions: Additions | None) -> None:
    if additions is not None:
        logits.view(-1).index_add_(0, _flat(logits, additions.rows, additions.token_ids), additions.values)


def _penalise(logits: Tensor, penalties: Penalties | None) -> None:
    """Repetition counts prompt and output (Keskar et al., 2019); presence and frequency the output alone (OpenAI)."""
    if penalties is None:
        return
    rows = logits[penalties.chosen]
    seen = torch.zeros_like(rows, dtype=torch.bool)
    seen.view(-1).index_fill_(0, _places(rows, penalties.in_all), True)
    repeated = torch.where(rows > 0, rows / penalties.repetition, rows * penalties.repetition)
    rows = torch.where(seen, repeated, rows)
    counts, places = torch.zeros_like(rows), _places(rows, penalties.in_output)
    counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=counts.dtype))
    logits[penalties.chosen] = rows - penalties.frequency * counts - penalties.presence * (counts > 0)


def _places(logits: Tensor, occurred: Occurrences) -> Tensor:
    rows = torch.arange(len(occurred.counts), device=logits.device)
    owners = torch.repeat_interleave(rows, occurred.counts, output_size=len(occurred.token_ids))
    return _flat(logits, owners, occurred.token_ids)


def _flat(logits: Tensor, rows: Tensor, token_ids: Tensor) -> Tensor:
    """Index of each place in the flattened logits: index_put_ would read the range of two indices on the host."""
    return rows * logits.shape[1] + token_ids


def _cut_below(logits: Tensor, floor: Tensor) -> None:
    logits.masked_fill_(logits < floor, float("-inf"))


def _kth_largest(logits: Tensor, k: Tensor, max_k: int) -> Tensor:
    """k: [R, 1] -> [R, 1], -inf where k is all of them; max_k: the largest of the others."""
    off = k == logits.shape[-1]
    limited = k.masked_fill(off, 1)
    kth = logits.topk(max_k, dim=-1).values.gather(1, limited - 1)
    return kth.masked_fill_(off, float("-inf"))


def _logprobs(logits: Tensor, token_ids: Tensor, plan: SamplingPlan) -> TopLogprobs | None:
    if plan.logprobs is None:
        return None
    chosen, most = plan.logprobs.chosen, max(count for count in plan.logprobs.counts if count is not None)
    return top_logprobs(logits[chosen], token_ids[chosen].clamp(min=0), most)
