"""The requests of a scheduler from arrival to end, and the size of the cache, which limits their lengths."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from operator import attrgetter

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.base import BlockSpaceManager
from sarathi.core.scheduler.memory_recovery import MemoryRecovery
from sarathi.core.scheduler.request_state import RequestState, RunningRequests, WaitingQueue
from sarathi.messages import PrefixCacheStats, RequestUpdate
from sarathi.request import Request, RequestStatus

_MOST_REQUESTS = 2**48  # that ever arrive: the order of arrival is within that of priority


class RequestLifecycle:
    """Every request that has not ended waits or runs.

    max_model_len: longest prompt plus output, in tokens. A request that reaches it, or fills the whole cache, ends with
    finish reason "length". num_micro_batches: see RunningRequests.
    """

    def __init__(
        self, config: SchedulerConfig, block_space_manager: BlockSpaceManager, max_model_len: int,
        num_micro_batches: int,
    ) -> None:  # fmt: skip
        self.config = config
        self.block_space_manager = block_space_manager
        self.max_model_len = max_model_len
        self._prefixes = block_space_manager.prefixes
        self._running = RunningRequests(block_space_manager, num_micro_batches)
        self._waiting = WaitingQueue()
        self._memory = MemoryRecovery(block_space_manager, self._running, max_model_len)
        self._states: dict[str, RequestState] = {}
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or the worker has yet to be told about the end of one, or of free memory."""
        ended = self._running.finished_ids or self._running.finishing
        return bool(self._states or ended) or (self._prefixes is not None and self._prefixes.has_evicted)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Requests that have not ended."""
        return tuple(self._states)

    @property
    def num_running(self) -> int:
        return len(self._running.running)

    @property
    def num_waiting(self) -> int:
        return len(self._states) - len(self._running.running)

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far, of all requests together."""
        return self._memory.num_preemptions

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        return PrefixCacheStats() if self._prefixes is None else self._prefixes.stats

    def add(self, request: Request) -> None:
        """Queue a request. RequestTooLongError if it could never run; ValueError if its id is in use."""
        if request.request_id in self._states or request.request_id in self._running.finishing:
            raise ValueError(f"request id {request.request_id!r} belongs to a request that has not ended")
        if not self._states and self._memory.is_short:
            self._fit(self._memory.full_capacity.rows)
        self._memory.check_length(request)
        order = request.priority * _MOST_REQUESTS + self._num_added
        state = RequestState(request, order, self._memory.max_output_tokens(request))
        self._num_added += 1
        self._states[request.request_id] = state
        self._waiting.push(state)

    def finish(self, request_id: str, reason: str, stop_reason: int | str | None = None) -> bool:
        """End a request at once, whatever its state; False if no request has this id (any more).

        reason: the caller's: "abort", or "stop" with the stop string as stop_reason.
        """
        state = self._states.get(request_id)
        if state is not None:
            self._end(state, reason, stop_reason)
            self._running.remove_ended()
        return state is not None

    def reset_prefix_cache(self) -> bool:
        """Forget the tokens of ended requests; False, with nothing done, while a request has not ended."""
        if self._states or self._running.finishing:
            return False
        if self._prefixes is not None:
            self._prefixes.evict_all()
        return True

    def resize(self, rows: int, reachable_rows: int | None = None) -> list[RequestUpdate]:
        """Change the size of the cache permanently; returns the ends of requests that are too long for it.

        reachable_rows: to which it may grow later, so that requests may be as long; None: `rows`.
        """
        rows_later = rows if reachable_rows is None else reachable_rows
        full = replace(self._memory.full_capacity, rows=rows)
        self._memory.full_capacity, self._memory.reachable_capacity = full, replace(full, rows=rows_later)
        return self._fit(rows)

    def wanted_rows(self, most: int) -> int:
        """Rows that requests would hold if there were any number, `most` at most: a row more than now for each, and
        those of the requests that wait, as far as they could run."""
        rows = self.block_space_manager.num_used_rows
        for state in islice(self._states.values(), self.config.max_num_seqs):
            if rows >= most:
                break
            is_running = state.request.status is RequestStatus.RUNNING
            rows += 1 if is_running else self.block_space_manager.capacity.rows_for(state.request.num_tokens) + 1
        return min(rows, most)

    def oldest_need(self) -> tuple[str | None, int]:
        """The request that goes before all others, and the rows with which it goes on; None, 0: there is none."""
        candidates = [*self._running.running[:1], *filter(None, [self._waiting.first()])]
        oldest = min(candidates, key=attrgetter("arrival"), default=None)
        if oldest is None:
            return None, 0
        rows = self.block_space_manager.capacity.rows_for(oldest.request.num_tokens + 1)
        return oldest.request.request_id, rows + 1

    def is_unfinished(self, request_id: str) -> bool:
        """Whether a request of this id has been added and has not ended."""
        return request_id in self._states

    def _end(self, state: RequestState, reason: str, stop_reason: int | str | None = None) -> None:
        """The one place where a request ends, except for reset(). It stays in `running` until remove_ended()."""
        request = state.request
        was_running = request.status is RequestStatus.RUNNING
        request.end(reason, stop_reason)
        if not was_running:
            self._waiting.note_ended()
        if state.is_known:
            self._running.release(state)
        del self._states[request.request_id]

    def _fit(self, rows: int) -> list[RequestUpdate]:
        """Set the current capacity, and end the running requests that would not fit in it even alone."""
        updates = []
        for state, reason in self._memory.resize(rows, self._states.values()):
            self._end(state, reason)
            updates.append(RequestUpdate(state.request.request_id, finish_reason=reason))
        self._running.remove_ended()
        return updates

    def check_integrity(self) -> None:
        """Raise RuntimeError if requests and memory are inconsistent."""
        self._running.check_integrity(self._states)
