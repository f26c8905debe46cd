"""The front end's interface to an engine core.

`EngineCore` implements it for a core in this process. A client of a core in another process can implement it too, since
all arguments and results are plain messages.
"""

from collections.abc import Sequence
from typing import Protocol

from sarathi.messages import CoreOutput, EngineFacts, MemoryStats, NewRequest, PrefixCacheStats


class CoreClient(Protocol):
    """Not thread-safe: only one thread at a time may call it."""

    facts: EngineFacts
    is_asleep: bool

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, including releasing the memory of finished requests."""

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        """Queue requests in order. If one is rejected, those before it stay queued.

        Raises RequestTooLongError for a request that could never run, ValueError for an id that is in use.
        """

    def finish(self, request_id: str, reason: str, stop_reason: str | None = None) -> None:
        """End a request from outside: "abort", or "stop" with the stop string. No update of it follows.

        An unknown request id is ignored.
        """

    def step(self) -> CoreOutput:
        """Run one step and return its updates. After an exception, call `reset`."""

    def reset(self) -> None:
        """End every request, even after an exception. No update of them follows."""

    def sleep(self, level: int = 1) -> None:
        """Preempt every request and return the cache's memory to the system. Requests wait until `wake_up`.

        level: 1, or 2 to release the weights too; `wake_up` reads them from the checkpoint. ValueError for another
        level, and for 2 on a GPU without mapped_weights.
        """

    def wake_up(self) -> None:
        """Allocate the memory again and resume. ValueError if the weights cannot be read: the core stays asleep."""

    def reset_prefix_cache(self) -> bool:
        """Drop the cached prefixes of finished requests; False, without effect, while a request is unfinished."""

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Prefix cache hits so far, and the memory retained for finished requests."""

    def memory_stats(self) -> MemoryStats:
        """Current memory of the KV cache."""

    def shutdown(self) -> None:
        """End every request as `reset` does, and free the executor's memory. Idempotent."""
