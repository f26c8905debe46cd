"""The synchronous engine: it takes prompts and returns outputs, one step at a time."""

import time
from collections.abc import Callable

from sarathi.config.schema import EngineConfig
from sarathi.engine.core_client import CoreClient
from sarathi.engine.input_processor import InputProcessor, Prompt
from sarathi.engine.output_processor import OutputProcessor
from sarathi.engine.outputs import RequestOutput
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.messages import MemoryStats, PrefixCacheStats
from sarathi.metrics import MetricsSink, StepTimes
from sarathi.sampling_params import SamplingParams


class EngineShutDownError(RuntimeError):
    """The engine is shut down and accepts no requests."""


class LLMEngine:
    """Combines a core with input and output processing. Not thread-safe.

    clock: the core's, in seconds. metrics: None records nothing. end_token_ids: None: the tokenizer's.
    """

    def __init__(
        self,
        core: CoreClient,
        tokenizer: Tokenizer | None,
        clock: Callable[[], float] = time.monotonic,
        metrics: MetricsSink | None = None,
        end_token_ids: frozenset[int] | None = None,
    ) -> None:
        self.core = core
        self.tokenizer = tokenizer
        self._clock = clock
        self._metrics = metrics
        if end_token_ids is None:
            end_token_ids = frozenset() if tokenizer is None else tokenizer.eos_token_ids
        self._inputs = InputProcessor(tokenizer, core.facts.vocab_size, end_token_ids)
        self._outputs = OutputProcessor(tokenizer, clock, metrics)
        self._is_shut_down = False

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLMEngine":
        """Build an engine and load its model. Raises ValueErrors that name the setting at fault."""
        from sarathi.engine.build import build_core, build_tokenizer  # slow: imports checkpoint readers

        if config.cache.kv_budget_group is not None:
            raise ValueError(
                f"kv_budget_group is {config.cache.kv_budget_group!r}: an engine that shares its memory needs its own "
                "process: use `sarathi serve` or AsyncLLM"
            )
        tokenizer, end_token_ids = build_tokenizer(config)
        return cls(build_core(config), tokenizer, end_token_ids=end_token_ids)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, including releasing the memory of finished requests."""
        return not self._is_shut_down and self.core.has_work

    @property
    def num_unfinished(self) -> int:
        """Number of unfinished requests."""
        return len(self._outputs.states)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether a request with this id is unfinished."""
        return request_id in self._outputs.states

    def add_request(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams, arrival_time_s: float | None = None
    ) -> None:
        """Queue a prompt (text or token ids). Raises ValueError, without effect, if the id is in use, the prompt is
        empty or too long, or the model does not support a parameter.

        arrival_time_s: on the engine's clock; None: now.
        """
        if self._is_shut_down:
            raise EngineShutDownError("the engine is shut down: it takes no more requests")
        requests = self._inputs.process(request_id, prompt, sampling_params)
        arrived_at_s = self._clock() if arrival_time_s is None else arrival_time_s
        state = self._outputs.add(request_id, prompt if isinstance(prompt, str) else None, requests, arrived_at_s)
        try:
            self.core.add_requests(requests)
        except BaseException:
            for request in requests:
                self.core.finish(request.request_id, "error")
            self._outputs.end(state, "error")
            raise

    def step(self) -> list[RequestOutput]:
        """Launch one step and process the oldest one's result. Returns outputs of requests that got
        tokens or ended.

        If the executor keeps several steps in flight, the first call returns no outputs. Any exception, including
        KeyboardInterrupt, ends every request without a final output and propagates; the engine stays usable.
        """
        try:
            message = self.core.step()
            outputs, stops = self._outputs.process(message)
            for request_id, stop in stops:
                self.core.finish(request_id, "stop", stop)
            if self._metrics is not None and message.step is not None:
                out, result, started_s, scheduled_s, executed_s = message.step
                times = StepTimes(started_s, scheduled_s, executed_s, self._clock())
                self._metrics.on_step(out, result, times)
        except BaseException:
            try:
                self.core.reset()
            finally:
                self._outputs.end_all("error")
            raise
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request and return its final output; None for an unknown request."""
        state = self._outputs.states.get(request_id)
        if state is None:
            return None
        for completion in state.completions:
            self.core.finish(completion.request_id, "abort")
        return self._outputs.end(state, "abort")

    def release_ended(self) -> None:
        """Run steps until the executor has released all memory, if no request is unfinished."""
        while not self._outputs.states and not self._is_shut_down and self.core.has_work:
            self.step()

    def reset_prefix_cache(self) -> bool:
        """Drop the cached prefixes of finished requests; False, without effect, while a request is unfinished."""
        is_reset = self.core.reset_prefix_cache()
        if is_reset:
            self.release_ended()
        return is_reset

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Prefix cache hits so far, and the memory retained for finished requests."""
        return self.core.prefix_cache_stats()

    def memory_stats(self) -> MemoryStats:
        """Current memory of the KV cache."""
        return self.core.memory_stats()

    def shutdown(self) -> None:
        """End every request without a final output, and free the memory of model and cache. The engine then accepts no
        requests. Idempotent."""
        self._is_shut_down = True
        try:
            self.core.shutdown()
        finally:
            self._outputs.end_all("error")
