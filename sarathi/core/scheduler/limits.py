"""How long a request can get: by its own wish, by the model, by the cache. Knows no queues."""

from __future__ import annotations

from sarathi.messages import CacheCapacity
from sarathi.request import Request


class RequestTooLongError(ValueError):
    """A request that could never run, refused on arrival."""


def refuse_too_long(request: Request, max_model_len: int, capacity: CacheCapacity) -> None:
    """Raise RequestTooLongError, with the numbers, if there is no room for the prompt and one output token."""
    num_tokens, in_cache = request.num_tokens, capacity.tokens_in(capacity.rows)
    if num_tokens >= max_model_len:
        raise RequestTooLongError(
            f"request {request.request_id!r} has {num_tokens} tokens: the longest sequence is {max_model_len} tokens, "
            "and at least one of them is for the output"
        )
    if num_tokens > in_cache:
        raise RequestTooLongError(
            f"request {request.request_id!r} has {num_tokens} tokens: the whole cache holds {in_cache} "
            f"({capacity.rows} rows)"
        )


def max_output_tokens(request: Request, max_model_len: int, capacity: CacheCapacity) -> int:
    """Output length at which the request ends; the last token of all need not be in the cache."""
    wanted = request.sampling_params.max_tokens
    longest = min(max_model_len, capacity.tokens_in(capacity.rows) + 1)
    room = longest - request.num_prompt_tokens
    return room if wanted is None else min(wanted, room)
