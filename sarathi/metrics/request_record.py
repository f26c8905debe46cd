"""One request of a run, and every metric of it by its published name. Knows no clock, no engine and no file format.

Times are seconds of one clock, whichever it was. One request's life, and the spans that the metrics are made of:

    arrived        scheduled                first token                          finished
    |--------------|========|···|===========|=====|··|=====|········|=====|=====|
     scheduling     = in a step  · beside steps                preempted
     delay          (execution)    (preemption, with the time spent preempted)

The names, and what each divides by, are those of Sarathi-Serve's metrics store, so that notebooks written for its CSV
files read these. Metrics of what has not happened are None.
"""

from array import array
from dataclasses import dataclass, field
from itertools import pairwise

from sarathi.messages import CacheCapacity


@dataclass(slots=True)
class RequestRecord:
    """One request: what was seen of it, and the metrics that follow.

    token_times_s: when each output token was there, in order.
    execution_s: sum of the durations of the steps that it was part of.
    num_steps: those steps. num_restarts: how often its memory was taken and its tokens computed again.
    capacity: how its tokens are stored; None where that is not known.
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
        """Whether it ran to its own end: neither refused, nor aborted, nor cut off with the run."""
        return self.finish_reason in ("stop", "length") and bool(self.token_times_s)

    @property
    def finished_at_s(self) -> float | None:
        """Its end, or the time of its last token where that was noted later in the same step."""
        if self.closed_at_s is None or not self.token_times_s:
            return self.closed_at_s
        return max(self.closed_at_s, self.token_times_s[-1])

    @property
    def first_token_at_s(self) -> float | None:
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def token_gaps_s(self) -> list[float]:
        """Time between each two tokens that follow each other; n - 1 values of n tokens."""
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
        """Those with memory in the end: keys and values of the last output token were never needed."""
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
        """Steps that it was part of: after each of them a request waits for the next."""
        return self.num_steps

    @property
    def request_num_ignored(self) -> int:
        """1 where it ended without being served."""
        return int(self.closed_at_s is not None and not self.is_complete)

    @property
    def kv_blocks_mapped(self) -> int | None:
        """Rows of memory that its tokens took in the end: pages of each region, or blocks where paged."""
        return self.capacity.rows_for(self.num_stored_tokens) if self.capacity else None

    @property
    def kv_fragmentation_percent(self) -> float | None:
        """The part of those rows that no token filled."""
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
        """Time from its first step to its end in which it was part of no step."""
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
