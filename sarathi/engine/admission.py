"""Admission control: limits the requests that wait for their first step and the length of prompts; estimates when a
rejected caller should retry."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sarathi.containers import is_list
from sarathi.core.scheduler import RequestTooLongError
from sarathi.engine.tokenizer.chat_template import Conversation
from sarathi.messages import EngineFacts

_MAX_RETRY_S = 60
_MAX_CHARACTERS_PER_TOKEN = 256  # the longest tokens of usual vocabularies are 128 spaces
_RATE_WINDOW = 256  # number of recent request starts from which the rate is estimated


class OverloadedError(RuntimeError):
    """Too many requests are waiting. retry_after_s: estimated whole seconds until these have started."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class QueueLimits:
    """Limits of the queue; None: unlimited. Each of a prompt's n completions counts as a request."""

    max_requests: int | None = None
    max_prompt_tokens: int | None = None


UNLIMITED = QueueLimits()


class Admission:
    """Tracks waiting requests and their prompt tokens. A request is always admitted to an empty queue."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._num_requests = 0
        self._num_tokens = 0
        self._starts_s: deque[float] = deque(maxlen=_RATE_WINDOW)

    @property
    def num_waiting(self) -> int:
        """Completions that have not started."""
        return self._num_requests

    def enter(self, request_id: str, n: int = 1) -> None:
        """Admit a prompt with n completions, before its length is known. OverloadedError if too many wait."""
        limit = self._limits.max_requests
        if limit is not None and self._num_requests and self._num_requests + n > limit:
            raise self._overloaded(f"{self._num_requests} requests are waiting: the limit is {limit}")
        self._waiting[request_id] = _Waiting(n)
        self._num_requests += n

    def set_length(self, request_id: str, num_tokens: int) -> None:
        """Set a prompt's length. OverloadedError if the waiting prompts would have too many tokens."""
        waiting, limit = self._waiting[request_id], self._limits.max_prompt_tokens
        num_tokens *= waiting.n
        if limit is not None and self._num_tokens and self._num_tokens + num_tokens > limit:
            message = f"{self._num_tokens + num_tokens} prompt tokens would be waiting: the limit is {limit}"
            raise self._overloaded(message)
        waiting.num_tokens = num_tokens
        self._num_tokens += num_tokens

    def start(self, request_id: str) -> None:
        """Record that a request is computed for the first time. Later calls have no effect."""
        waiting = self.leave(request_id)
        if waiting is not None:
            self._starts_s.extend([self._clock()] * waiting.n)

    def leave(self, request_id: str) -> "_Waiting | None":
        """Remove a request from the queue; None if it was not waiting."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            self._num_requests -= waiting.n
            self._num_tokens -= waiting.num_tokens
        return waiting

    def _overloaded(self, message: str) -> OverloadedError:
        return OverloadedError(message, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """The time in which, at the recent rate, all waiting requests start."""
        elapsed_s = self._clock() - self._starts_s[0] if self._starts_s else math.inf
        expected_s = self.num_waiting * elapsed_s / max(len(self._starts_s), 1)
        return _MAX_RETRY_S if expected_s > _MAX_RETRY_S else max(1, math.ceil(expected_s))


@dataclass
class _Waiting:
    """n: completions of the prompt. num_tokens: prompt tokens of all completions together."""

    n: int
    num_tokens: int = 0


def check_tokens(count: int, facts: EngineFacts) -> None:
    """RequestTooLongError for a prompt with more tokens than the engine can run."""
    limit = facts.max_prompt_tokens
    if count > limit:
        raise RequestTooLongError(f"the prompt has {count} tokens: the longest that can run has {limit}")


def check_characters(count: int, facts: EngineFacts) -> None:
    """RequestTooLongError for text that is certainly too long. Saves its tokenization, seconds per 10 MB."""
    limit = facts.max_prompt_tokens
    if count > limit * _MAX_CHARACTERS_PER_TOKEN:
        raise RequestTooLongError(f"the prompt has {count} characters: the longest that can run has {limit} tokens")


def num_characters(conversation: Conversation) -> int:
    """Characters in the messages' contents. Does not validate them."""
    if not is_list(conversation):
        return 0
    contents = [each.get("content") for each in conversation if isinstance(each, Mapping)]
    return sum([len(each) if isinstance(each, str) else len(repr(each)) for each in contents])
