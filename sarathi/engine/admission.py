"""Which requests are taken: how many may wait for their first step, when a caller who is refused should come back, and
how long a prompt may be."""

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
_MOST_CHARACTERS_A_TOKEN = 256  # the longest tokens of usual vocabularies are 128 spaces
_RATE_WINDOW = 256  # starts of requests that the rate is measured over


class OverloadedError(RuntimeError):
    """Too many requests are waiting. retry_after_s: whole seconds until this many have probably started."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class QueueLimits:
    """What may wait at the same time; None: any number. Each of a prompt's n completions is a request."""

    max_requests: int | None = None
    max_prompt_tokens: int | None = None


UNLIMITED = QueueLimits()


class Admission:
    """The requests that have not begun, with their prompt tokens. One that waits alone may exceed both limits."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._num_requests = 0
        self._num_tokens = 0
        self._starts_s: deque[float] = deque(maxlen=_RATE_WINDOW)

    @property
    def num_waiting(self) -> int:
        """Completions that have not begun."""
        return self._num_requests

    def enter(self, request_id: str, n: int = 1) -> None:
        """A prompt for n completions arrives, its length not known yet. OverloadedError where too many wait."""
        most = self._limits.max_requests
        if most is not None and self._num_requests and self._num_requests + n > most:
            raise self._overloaded(f"{self._num_requests} requests are waiting: the limit is {most}")
        self._waiting[request_id] = _Waiting(n)
        self._num_requests += n

    def set_length(self, request_id: str, num_tokens: int) -> None:
        """OverloadedError where the prompts that wait would have too many tokens."""
        waiting, most = self._waiting[request_id], self._limits.max_prompt_tokens
        num_tokens *= waiting.n
        if most is not None and self._num_tokens and self._num_tokens + num_tokens > most:
            message = f"{self._num_tokens + num_tokens} prompt tokens would be waiting: the limit is {most}"
            raise self._overloaded(message)
        waiting.num_tokens = num_tokens
        self._num_tokens += num_tokens

    def start(self, request_id: str) -> None:
        """A request is computed for the first time, or for the first time again."""
        waiting = self.leave(request_id)
        if waiting is not None:
            self._starts_s.extend([self._clock()] * waiting.n)

    def leave(self, request_id: str) -> "_Waiting | None":
        """A request waits no more, for whatever reason; None where it did not wait."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            self._num_requests -= waiting.n
            self._num_tokens -= waiting.num_tokens
        return waiting

    def _overloaded(self, message: str) -> OverloadedError:
        return OverloadedError(message, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """The time in which as many requests started lately as wait now."""
        elapsed_s = self._clock() - self._starts_s[0] if self._starts_s else math.inf
        expected_s = self.num_waiting * elapsed_s / max(len(self._starts_s), 1)
        return _MAX_RETRY_S if expected_s > _MAX_RETRY_S else max(1, math.ceil(expected_s))


@dataclass
class _Waiting:
    """n: completions of the prompt. num_tokens: of its prompt, for each of them."""

    n: int
    num_tokens: int = 0


def check_tokens(count: int, facts: EngineFacts) -> None:
    """RequestTooLongError for a prompt of more tokens than can run."""
    most = facts.max_prompt_tokens
    if count > most:
        raise RequestTooLongError(f"the prompt has {count} tokens: the longest that can run has {most}")


def check_characters(count: int, facts: EngineFacts) -> None:
    """RequestTooLongError for text that is certainly too long: tokenizing it would take seconds for each 10 MB."""
    most = facts.max_prompt_tokens
    if count > most * _MOST_CHARACTERS_A_TOKEN:
        raise RequestTooLongError(f"the prompt has {count} characters: the longest that can run has {most} tokens")


def num_characters(conversation: Conversation) -> int:
    """Of the contents, of whatever kind they are: what is wrong with them is told later."""
    if not is_list(conversation):
        return 0
    contents = [each.get("content") for each in conversation if isinstance(each, Mapping)]
    return sum([len(each) if isinstance(each, str) else len(repr(each)) for each in contents])
