"""One request of a run, and its metrics under their published names.

Times are seconds of one monotonic clock. Metrics are computed from these phases of a request:

    arrived        scheduled                first token                          finished
    |--------------|========|···|===========|=====|··|=====|········|=====|=====|
     scheduling     = in a step  · between steps               preempted
     delay          (execution)    (preemption, including the time spent preempted)

Names and denominators are those of Sarathi-Serve's metrics store: notebooks for its CSV files read these too.
Metrics of events that have not happened are None.
"""

from array import array
from dataclasses import dataclass, field
from itertools import pairwise

from sarathi.messages import CacheCapacity


@dataclass(slots=True)
class RequestRecord:
    """The observations of one request, and the metrics computed from them.

    token_times_s: when each output token was returned, in order.
    execution_s: total duration of the steps that contained the request. num_steps: number of those steps.
    num_restarts: number of preemptions.
    capacity: of the KV cache, to count the rows that the request used; None if unknown.
    """

    request_id: str
    num_prompt_tokens: int
    arrived_at_s: float
    inter_arrival_s: float | None = None
    scheduled_at_s: float | None = None
    closed_at_s: float | None = None
    finish_reason: str | None = None
    execution_s: float = 0.0
    num_steps: int = 0
    num_restarts: int = 0
    token_times_s: "array[float]" = field(default_factory=lambda: array("d"))
    capacity: CacheCapacity | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it finished normally: not refused, not aborted, and not cut off at the end of the run."""
        return self.finish_reason in ("stop", "length") and bool(self.token_times_s)

    @property
    def finished_at_s(self) -> float | None:
        """End time, or the time of the last token if that was recorded later in the same step."""
        if self.closed_at_s is None or not self.token_times_s:
            return self.closed_at_s
        return max(self.closed_at_s, self.token_times_s[-1])

    @property
    def first_token_at_s(self) -> float | None:
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def token_gaps_s(self) -> list[float]:
        """Times between consecutive tokens: n - 1 values for n tokens."""
        times = self.token_times_s
        return [after - before for before, after in pairwise(times)]

    @property
    def request_num_decode_tokens(self) -> int:
        return len(self.token_times_s)

    @property
    def request_num_prefill_tokens(self) -> int:
        return self.num_prompt_tokens

    @property
    def request_num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.token_times_s)

    @property
    def num_stored_tokens(self) -> int:
        """Tokens in the cache at its end: all but the last output token, which is never an input."""
        return self.num_prompt_tokens + max(len(self.token_times_s) - 1, 0)

    @property
    def request_pd_ratio(self) -> float | None:
        return _ratio(self.num_prompt_tokens, len(self.token_times_s))

    @property
    def request_inter_arrival_delay(self) -> float | None:
        return self.inter_arrival_s

    @property
    def request_num_restarts(self) -> int:
        return self.num_restarts

    @property
    def request_num_pauses(self) -> int:
        """Number of steps that contained it: Sarathi-Serve counts a pause after each."""
        return self.num_steps

    @property
    def request_num_ignored(self) -> int:
        """1 if it ended without being served, else 0."""
        return int(self.closed_at_s is not None and not self.is_complete)

    @property
    def kv_blocks_mapped(self) -> int | None:
        """Rows in use at its end: pages of each region, or blocks of paged memory."""
        return self.capacity.rows_for(self.num_stored_tokens) if self.capacity else None

    @property
    def kv_fragmentation_percent(self) -> float | None:
        """Unfilled part of these rows, in percent."""
        if not self.capacity or not self.kv_blocks_mapped:
            return None
        used = self.num_stored_tokens * self.capacity.token_bytes
        return 100.0 * (1.0 - used / (self.kv_blocks_mapped * self.capacity.page_bytes))

    @property
    def request_e2e_time(self) -> float | None:
        return _difference(self.finished_at_s, self.arrived_at_s)

    @property
    def request_e2e_time_normalized(self) -> float | None:
        return self._a_token(self.request_e2e_time)

    @property
    def request_e2e_time_piecewise_normalized(self) -> float | None:
        return _sum(self.request_scheduling_delay, self.request_execution_plus_preemption_time_normalized)

    @property
    def request_execution_time(self) -> float | None:
        return self.execution_s if self.closed_at_s is not None else None

    @property
    def request_execution_time_normalized(self) -> float | None:
        return self._a_token(self.request_execution_time)

    @property
    def request_preemption_time(self) -> float | None:
        """Time between its first step and its end in which it was in no step."""
        served = self.request_execution_plus_preemption_time
        return None if served is None else max(served - self.execution_s, 0.0)

    @property
    def request_scheduling_delay(self) -> float | None:
        return _difference(self.scheduled_at_s, self.arrived_at_s)

    @property
    def request_execution_plus_preemption_time(self) -> float | None:
        return _difference(self.finished_at_s, self.scheduled_at_s)

    @property
    def request_execution_plus_preemption_time_normalized(self) -> float | None:
        return self._a_token(self.request_execution_plus_preemption_time)

    @property
    def prefill_e2e_time(self) -> float | None:
        """Time to first token."""
        return _difference(self.first_token_at_s, self.arrived_at_s)

    @property
    def prefill_e2e_time_normalized(self) -> float | None:
        return _ratio(self.prefill_e2e_time, self.num_prompt_tokens)

    @property
    def prefill_e2e_time_piecewise_normalized(self) -> float | None:
        return _sum(self.request_scheduling_delay, self.prefill_time_execution_plus_preemption_normalized)

    @property
    def prefill_time_execution_plus_preemption(self) -> float | None:
        return _difference(self.first_token_at_s, self.scheduled_at_s)

    @property
    def prefill_time_execution_plus_preemption_normalized(self) -> float | None:
        return _ratio(self.prefill_time_execution_plus_preemption, self.num_prompt_tokens)

    @property
    def decode_time_execution_plus_preemption_normalized(self) -> float | None:
        return self._a_token(_difference(self.finished_at_s, self.first_token_at_s))

    def _a_token(self, seconds: float | None) -> float | None:
        return _ratio(seconds, len(self.token_times_s))


def _difference(end: float | None, start: float | None) -> float | None:
    return None if end is None or start is None else end - start


def _ratio(value: float | None, count: int) -> float | None:
    return None if value is None or not count else value / count


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
