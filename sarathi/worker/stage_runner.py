"""Model runner of a pipeline's stage on a CPU: one thread computes, in order, while later steps are prepared."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from sarathi.messages import SchedulerOutput, StepFuture, StepResult
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.parallel.ranks import Ranks
from sarathi.worker.model_runner import KVCache, ModelRunner, PreparedStep
from sarathi.worker.sequences import SequenceTable


class LaunchedStep:
    """The StepFuture of a step in the thread; result() appends its tokens to `sequences`."""

    def __init__(self, future: "Future[StepResult]", sequences: SequenceTable) -> None:
        self._future, self._sequences = future, sequences
        self._outcome: StepResult | None = None

    def result(self) -> StepResult:
        if self._outcome is None:
            self._outcome = self._future.result()
            self._sequences.append(self._outcome.tokens)
        return self._outcome


class StageModelRunner(ModelRunner):
    """As many steps may be in flight as the pipeline has stages. A step's model_s is without the wait for its input."""

    def __init__(
        self, model: Decoder, backend: AttentionBackend, cache: KVCache, layers: Sequence[CacheLayer], ranks: Ranks
    ) -> None:
        super().__init__(model, backend, cache, layers)
        self._ranks, self._thread = ranks, ThreadPoolExecutor(1, "stage")
        self._newest: Future[StepResult] | None = None

    def launch(self, out: SchedulerOutput, sequences: SequenceTable) -> StepFuture:
        self._newest = self._thread.submit(self._compute_step, self._prepare_step(out, sequences))
        return LaunchedStep(self._newest, sequences)

    def wait(self) -> None:
        if self._newest is not None:
            wait([self._newest])

    def _compute_step(self, step: PreparedStep) -> StepResult:
        waited_s = self._ranks.waited_s
        result = super()._compute_step(step)
        return replace(result, model_s=result.model_s - (self._ranks.waited_s - waited_s))
