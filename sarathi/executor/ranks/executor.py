"""An executor whose ranks are elsewhere: the part that does not depend on where."""

from dataclasses import fields
from typing import Any

from sarathi.executor.base import Executor
from sarathi.executor.ranks.group import START_SILENCE_S, RankError, RankGroup
from sarathi.executor.ranks.protocol import RankFacts, Transport
from sarathi.messages import MemoryStats, SchedulerOutput, StepResult

_CLOSE_S = 20.0


class LaunchedStep:
    """The StepFuture of a step on all ranks."""

    def __init__(self, executor: "RanksExecutor", number: int) -> None:
        self._executor, self._number = executor, number
        self._outcome: StepResult | None = None

    def result(self) -> StepResult:
        if self._outcome is None:
            self._outcome = self._executor.ask("result", self._number)[0]
        return self._outcome


class RanksExecutor(Executor):
    """Sends each step to every rank, as one message. A subclass starts the ranks."""

    takes_functions = False

    def __init__(self, transport: Transport) -> None:
        """transport: to ranks that have started, but may still load their model."""
        self._ranks = RankGroup(transport)
        facts: list[RankFacts] = self._ranks.ask("facts", silence_s=START_SILENCE_S)
        self.capacity = min((each.capacity for each in facts), key=lambda capacity: capacity.rows)
        self.token_bytes = sum(each.token_bytes for each in facts)
        self.vocab_size, self.max_model_len = facts[0].vocab_size, facts[0].max_model_len
        self.resolution, self.max_in_flight = facts[0].resolution, facts[0].max_in_flight
        self._num_launched = 0

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """The replies of the ranks that answer a command. Raises RankError where one died, hung or failed."""
        return self._ranks.ask(method, *arguments)

    def launch(self, out: SchedulerOutput) -> LaunchedStep:
        number, self._num_launched = self._num_launched, self._num_launched + 1
        self.ask("launch", number, out)
        return LaunchedStep(self, number)

    def execute(self, out: SchedulerOutput) -> StepResult:
        """Launch one step and wait for its result."""
        return self.launch(out).result()

    def wait(self) -> None:
        if self._ranks.are_running:
            self.ask("wait")

    def memory_stats(self) -> MemoryStats:
        if not self._ranks.are_running:
            return MemoryStats()
        stats: list[MemoryStats] = self.ask("memory_stats")
        names = [each.name for each in fields(MemoryStats)]
        return MemoryStats(**{name: sum(getattr(each, name) for each in stats) for name in names})

    def check_integrity(self) -> None:
        if self._ranks.are_running:
            self.ask("check_integrity")

    def shutdown(self) -> None:
        """Kills ranks that do not close within some seconds."""
        try:
            if self._ranks.are_running:
                self._ranks.ask("close", limit_s=_CLOSE_S)
        except RankError:
            pass  # it is gone, as it should be
        finally:
            self._ranks.kill()
