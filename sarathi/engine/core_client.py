"""What the front end may ask of an engine core.

`EngineCore` itself is the client of a core in this process. A client for a core in another process implements the same
protocol, since every argument and every result is a plain message.
"""

from collections.abc import Sequence
from typing import Protocol

from sarathi.messages import CoreOutput, EngineFacts, MemoryStats, NewRequest, PrefixCacheStats


class CoreClient(Protocol):
    """One thread at a time may call it."""

    facts: EngineFacts
    is_asleep: bool

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, if only release the memory of requests that have ended."""

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        """Queue requests, in order. Where one is refused, those before it stay queued.

        Raises RequestTooLongError where a request could never run, ValueError where an id is in use.
        """

    def finish(self, request_id: str, reason: str, stop_reason: str | None = None) -> None:
        """End a request for a reason found outside: "abort", or "stop" with the stop string. No update of it follows.

        Nothing happens where there is no such request (any more).
        """

    def step(self) -> CoreOutput:
        """One step's updates. After an exception, call `reset`."""

    def reset(self) -> None:
        """End every request, in whatever state an exception left them. No update of them follows."""

    def sleep(self, level: int = 1) -> None:
        """Preempt every request, and give the cache's memory back to the system. Requests wait until `wake_up`.

        level: 2: the memory of the weights too; they are read from the checkpoint again. ValueError for another level,
        and for 2 on a GPU without mapped_weights.
        """

    def wake_up(self) -> None:
        """Take the memory again, and go on. ValueError where weights cannot be read any more: it goes on sleeping."""

    def reset_prefix_cache(self) -> bool:
        """Forget the tokens of ended requests; False, with nothing done, while a request has not ended."""

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Tokens found in the cache so far, and what is kept of ended requests."""

    def memory_stats(self) -> MemoryStats:
        """Memory of the KV cache now."""

    def shutdown(self) -> None:
        """End every request as `reset` does, and free the executor's memory. May be called again."""
