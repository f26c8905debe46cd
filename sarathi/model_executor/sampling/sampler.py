"""From logits to tokens, for all rows of a step at once.

Only logits processors and grammars wait for the device: nothing else reads values, has shapes that depend on them, or
copies from the host. Order: logits processors, allowed tokens, grammars, bias and bad words, penalties,
then as in transformers temperature, top-k, top-p, min-p. Logprobs are of the logits given.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sarathi.messages import NO_TOKEN_LEFT, NOT_FINITE
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
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_ids: [S] int64 on the logits' device; NOT_FINITE or NO_TOKEN_LEFT where no token could be drawn.

    logprobs: of the plan's rows, or None.
    prompt: log probabilities of the plan's prompt tokens, or None.
    errors: errors of logits processors, by row.
    """

    token_ids: Tensor
    logprobs: TopLogprobs | None = None
    prompt: TopLogprobs | None = None
    errors: Mapping[int, str] = field(default_factory=dict)


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
    processed, errors = _processed(logits, plan, kernels)
    token_ids = kernels.argmax(processed)
    if plan.processing or plan.allowed or plan.masks or plan.additions:  # may exclude all tokens, or hide NaN logits
        token_ids.masked_fill_(token_ids < 0, NO_TOKEN_LEFT)
        token_ids.masked_fill_(kernels.argmax(logits) < 0, NOT_FINITE)
    if plan.draws is not None:
        chosen = plan.draws.chosen
        drawn = draw(processed[chosen].float(), plan.draws, kernels)
        token_ids[chosen] = torch.where(token_ids[chosen] < 0, token_ids[chosen], drawn)
    return Sampled(token_ids, _logprobs(logits, token_ids, plan), errors=errors)


def draw(logits: Tensor, draws: Draws, kernels: Ops) -> Tensor:
    """Draw one token for each row from the filtered distribution; overwrites logits [R, vocab_size] -> [R] int64."""
    return kernels.draw(filtered(logits, draws, kernels), draws.uniform)


def filtered(logits: Tensor, draws: Draws, kernels: Ops) -> Tensor:
    """Divide logits by the temperature and set filtered tokens to -inf; in place, [R, vocab_size] float32."""
    logits.div_(draws.temperature)
    if draws.top_k is not None:
        _cut_below(logits, _kth_largest(logits, draws.top_k, draws.max_top_k))
    if draws.top_p is not None:
        _cut_below(logits, kernels.top_p_threshold(logits, draws.top_p))
    if draws.log_min_p is not None:
        _cut_below(logits, logits.amax(dim=-1, keepdim=True) + draws.log_min_p)
    return logits


def _processed(logits: Tensor, plan: SamplingPlan, kernels: Ops) -> tuple[Tensor, dict[int, str]]:
    """The logits to draw from, a copy in float32 if the plan changes any; and errors of logits processors by row."""
    if not (plan.processing or plan.allowed or plan.masks or plan.additions or plan.penalties):
        return logits, {}
    logits = logits.to(torch.float32, copy=True)
    errors = _process(logits, plan.processing)
    _allow(logits, plan.allowed)
    _mask(logits, plan.masks, kernels)
    _add(logits, plan.additions)
    _penalise(logits, plan.penalties)
    return logits, errors


def _process(logits: Tensor, processing: Sequence[Processing]) -> dict[int, str]:
    """Call the logits processors of each row, in place. Returns their errors, by row."""
    failures = ((each.row, _process_row(logits[each.row], each)) for each in processing)
    return {row: failure for row, failure in failures if failure is not None}


def _process_row(row: Tensor, processing: Processing) -> str | None:
    """The error of a logits processor, or None. The row then becomes NaN, which ends its request. row: see `_apply`."""
    try:
        _apply(row, processing)
    except Exception as error:  # of a user's function: any
        _logger.warning("a logits processor failed", exc_info=True)
        row.fill_(float("nan"))
        return f"a logits processor failed: {type(error).__name__}: {error}"
    return None


def _apply(row: Tensor, processing: Processing) -> None:
    """row: [vocab_size] float32, overwritten. A function may change the logits that it is given, or return others."""
    for function in processing.functions:
        with_prompt = len(inspect.signature(function).parameters) == _PARAMETERS_WITH_PROMPT
        prompt = (processing.prompt_token_ids,) if with_prompt else ()
        changed = function(*prompt, processing.output_token_ids, row)
        if not isinstance(changed, Tensor) or changed.shape != row.shape:
            found = list(changed.shape) if isinstance(changed, Tensor) else short_repr(changed)
            raise ValueError(f"it returned {found}: it must return logits of shape {list(row.shape)}")
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
    """Indices in the flattened logits. index_put_ with two index tensors would wait for the device."""
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
