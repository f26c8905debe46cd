"""Runs a step on one rank: prepare, agree with the other ranks, run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from sarathi.messages import CompletedStep, SchedulerOutput, StepFuture, StepResult


class StepWorker(Protocol):
    """See sarathi.worker.worker.Worker."""

    def prepare(self, out: SchedulerOutput) -> int | None: ...
    def cancel(self, out: SchedulerOutput) -> None: ...
    def run(self, out: SchedulerOutput) -> StepFuture: ...


Agree = Callable[[int | None], int | None]
"""Combines all ranks' answers to `prepare`: None if every answer is None, else the minimum number of rows."""


class Steps:
    """Launches steps on one rank. Either all ranks run a step or none does."""

    def __init__(self, worker: StepWorker, agree: Agree = lambda available_rows: available_rows) -> None:
        self._worker, self._agree = worker, agree
        self._num_shortages = 0  # steps that lacked memory
        self._available_rows = 0

    def launch(self, out: SchedulerOutput) -> StepFuture:
        """A step scheduled before a shortage was known fails too, since it depends on the failed step."""
        if self._num_shortages > out.num_recoveries:
            self._worker.prepare(replace(out, chunks=(), received=()))
            return self._failed(out)
        own_rows = self._worker.prepare(out)
        available_rows = self._agree(own_rows)
        if available_rows is None:
            return self._worker.run(out)
        if own_rows is None:
            self._worker.cancel(out)
        self._num_shortages += 1
        self._available_rows = available_rows
        return self._failed(out)

    def _failed(self, out: SchedulerOutput) -> StepFuture:
        return CompletedStep(StepResult(out.step_id, available_rows=self._available_rows))
