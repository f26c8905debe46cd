"""How many requests may wait for their first step, and when a caller who is refused should come back."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_MAX_RETRY_S = 60
_RATE_WINDOW = 256  # starts of requests that the rate is measured over


class OverloadedError(RuntimeError):
    """Too many requests are waiting. retry_after_s: whole seconds until this many have probably started."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class QueueLimits:
    """What may wait at the same time; None: any number."""

    max_requests: int | None = None
    max_prompt_tokens: int | None = None


UNLIMITED = QueueLimits()


class Admission:
    """The requests that have not begun, with their prompt tokens."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._prompt_tokens: dict[str, int] = {}
        self._num_tokens = 0
        self._starts_s: deque[float] = deque(maxlen=_RATE_WINDOW)

    @property
    def num_waiting(self) -> int:
        return len(self._prompt_tokens)

    def enter(self, request_id: str) -> None:
        """A request arrives, its length not known yet. OverloadedError where too many wait."""
        most = self._limits.max_requests
        if most is not None and self.num_waiting >= most:
            raise self._overloaded(f"{self.num_waiting} requests are waiting: the limit is {most}")
        self._prompt_tokens[request_id] = 0

    def set_length(self, request_id: str, num_tokens: int) -> None:
        """OverloadedError where the prompts that wait would have too many tokens; a prompt alone may be longer."""
        most, total = self._limits.max_prompt_tokens, self._num_tokens + num_tokens
        if most is not None and self._num_tokens and total > most:
            raise self._overloaded(f"{total} prompt tokens would be waiting: the limit is {most}")
        self._prompt_tokens[request_id] = num_tokens
        self._num_tokens = total

    def start(self, request_id: str) -> None:
        """A request is computed for the first time, or for the first time again."""
        if self.leave(request_id):
            self._starts_s.append(self._clock())

    def leave(self, request_id: str) -> bool:
        """A request waits no more, for whatever reason; False where it did not wait."""
        num_tokens = self._prompt_tokens.pop(request_id, None)
        self._num_tokens -= num_tokens or 0
        return num_tokens is not None

    def _overloaded(self, message: str) -> OverloadedError:
        return OverloadedError(message, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """The time in which as many requests started lately as wait now."""
        elapsed_s = self._clock() - self._starts_s[0] if self._starts_s else math.inf
        expected_s = self.num_waiting * elapsed_s / max(len(self._starts_s), 1)
        return _MAX_RETRY_S if expected_s > _MAX_RETRY_S else max(1, math.ceil(expected_s))
