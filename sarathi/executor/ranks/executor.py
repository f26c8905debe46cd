"""The common part of executors whose ranks run in other processes."""

from typing import Any

from sarathi.config.schema import ParallelConfig
from sarathi.executor.base import Executor
from sarathi.executor.ranks.group import START_SILENCE_S, RankError, RankGroup
from sarathi.executor.ranks.protocol import RankFacts, Transport
from sarathi.messages import MemoryStats, SampledToken, SchedulerOutput, StepResult
from sarathi.model_executor.parallel.ranks import RankGrid

_CLOSE_S = 20.0


class LaunchedStep:
    """The StepFuture of a step on all ranks."""

    def __init__(self, executor: "RanksExecutor", number: int) -> None:
        self._executor, self._number = executor, number
        self._outcome: StepResult | None = None

    def result(self) -> StepResult:
        if self._outcome is None:
            self._outcome = self._executor.take_result(self._number)
        return self._outcome


class RanksExecutor(Executor):
    """Sends each step to every rank, as one message. A subclass starts the ranks."""

    takes_functions, health_check_interval_s = False, 1.0

    def __init__(self, transport: Transport, parallel: ParallelConfig, store: tuple[str, int]) -> None:
        """transport: to ranks that have started and may still be loading their model. store: host and port of a
        TCPStore that they can reach."""
        self.store = store
        self._grid = RankGrid(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        self._ranks = RankGroup(transport, self._grid)
        self._check_every = parallel.check_ranks_every
        self.num_stages = self._grid.num_stages
        facts: list[RankFacts] = self._ranks.ask("facts", silence_s=START_SILENCE_S)
        self.capacity = facts[0].capacity
        self.token_bytes = sum(each.token_bytes for each in facts)
        self.vocab_size, self.max_model_len = facts[0].vocab_size, facts[0].max_model_len
        self.resolution, self.max_in_flight = facts[0].resolution, facts[0].max_in_flight
        self._num_launched = 0
        self._pending_tokens: list[SampledToken] = []  # not yet sent to the stages before the last

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Send a command; returns the replies of ranks that answer it. Raises RankError if one died, hung or failed."""
        return self._ranks.ask(method, *arguments)

    def join(self, role: str, partner: "RanksExecutor") -> None:
        """Make these ranks fail when those of another engine fail. role: of this engine, for error messages."""
        self._ranks.join(role, partner._ranks)

    def kill(self, reason: str) -> None:
        """Kill every rank. reason: the error message of later commands."""
        self._ranks.kill(reason)

    def launch(self, out: SchedulerOutput) -> LaunchedStep:
        number, self._num_launched = self._num_launched, self._num_launched + 1
        tokens, self._pending_tokens = self._pending_tokens, []
        self.ask("launch", number, out, tokens)
        if self._check_every is not None and number % self._check_every == 0:
            self._compare_ranks(number)
        return LaunchedStep(self, number)

    def take_result(self, number: int) -> StepResult:
        """The result of a launch by its number, counted from 0."""
        result: StepResult = self.ask("result", number)[0]
        if self.num_stages > 1:
            self._pending_tokens += [SampledToken(token.request_id, token.token_id) for token in result.tokens]
        return result

    def execute(self, out: SchedulerOutput) -> StepResult:
        """Launch one step and wait for its result."""
        return self.launch(out).result()

    def check_health(self) -> None:
        self._ranks.check_health()

    def wait(self) -> None:
        """Raises RankError if the ranks have ended."""
        self.ask("wait")

    def memory_stats(self) -> MemoryStats:
        if not self._ranks.are_running:
            return MemoryStats()
        return MemoryStats.sum_of(self.ask("memory_stats"))

    def check_integrity(self) -> None:
        if self._ranks.are_running:
            self.ask("check_integrity")

    def resize_cache(self, rows: int) -> bool:
        return all(self.ask("resize_cache", rows))

    def drop_weights(self) -> None:
        self.ask("drop_weights")

    def load_weights(self) -> None:
        self.ask("load_weights")

    def busy_s(self) -> list[float]:
        """Seconds that each stage has computed so far; on GPUs including waits for its input."""
        return self.ask("busy_s")[:: self._grid.per_stage]

    def _compare_ranks(self, number: int) -> None:
        """Raise RankError if ranks differ in their requests, tokens or mapped lengths."""
        prints = self.ask("fingerprint")
        if other := [rank for rank, each in enumerate(prints) if each != prints[0]]:
            self._ranks.kill()
            raise RankError(f"launch {number}: ranks {other} hold other requests, tokens or lengths than rank 0")

    def shutdown(self) -> None:
        """Kills ranks that do not close within some seconds."""
        try:
            if self._ranks.are_running:
                self._ranks.ask("close", limit_s=_CLOSE_S)
        except RankError:
            pass  # it has ended already
        finally:
            self._ranks.close()
