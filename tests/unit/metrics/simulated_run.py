"""A store fed by a real scheduler over a simulated clock, for tests: every time that it should report is known."""

from dataclasses import dataclass, field

import numpy as np

from sarathi.messages import CacheCapacity, SampledToken, SchedulerOutput, StepResult
from sarathi.metrics import MetricsStore, StepTimes
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

CAPACITY = CacheCapacity(rows=1000, token_bytes=3, page_bytes=64)


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Truth:
    """What happened to one request, written down by the simulation itself."""

    arrived_s: float
    prompt: int
    scheduled_s: float | None = None
    tokens_s: list[float] = field(default_factory=list)
    in_steps_s: float = 0.0
    restarts: int = 0


class Simulation:
    """Drives a scheduler; each step takes a random time, and its parts are split at random."""

    def __init__(self, scheduler, store: MetricsStore, clock: Clock, rng: np.random.Generator) -> None:
        self.scheduler, self.store, self.clock, self.rng = scheduler, store, clock, rng
        self.truth: dict[str, Truth] = {}
        self.outs: list[SchedulerOutput] = []
        self.durations_s: list[float] = []

    def arrive(self, request_id: str, prompt: int, output: int) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        request = Request(request_id, tuple(range(1, prompt + 1)), params)
        self.scheduler.add(request)
        self.store.on_request_arrived(request_id, prompt, self.clock.now_s)
        self.truth[request_id] = Truth(self.clock.now_s, prompt)

    def step(self) -> None:
        start_s = self.clock.now_s
        out = self.scheduler.schedule()
        marks = start_s + np.sort(self.rng.uniform(0.001, 1.0, 3))
        result = StepResult(out.step_id, tuple(SampledToken(c.request_id, 7) for c in out.chunks if c.samples), 0.1)
        updates = self.scheduler.update(out, result)
        self.clock.now_s = float(marks[2])
        self._write_down(out, result, start_s)
        self.store.on_step(out, result, StepTimes(start_s, *map(float, marks)))
        for update in updates:
            if update.finish_reason is not None:
                self.store.on_request_finished(update.request_id, update.finish_reason)
        self.clock.now_s += float(self.rng.uniform(0, 0.1))

    def _write_down(self, out: SchedulerOutput, result: StepResult, start_s: float) -> None:
        end_s = self.clock.now_s
        for chunk in out.chunks:
            truth = self.truth[chunk.request_id]
            truth.in_steps_s += end_s - start_s
            truth.scheduled_s = start_s if truth.scheduled_s is None else truth.scheduled_s
        for token in result.tokens:
            self.truth[token.request_id].tokens_s.append(end_s)
        for request_id in out.preempted:
            self.truth[request_id].restarts += 1
        self.outs.append(out)
        self.durations_s.append(end_s - start_s)
