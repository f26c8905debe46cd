"""The engine: prompts in, outputs out, one step at a time."""

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
    """A request for an engine whose model and memory are gone."""


class LLMEngine:
    """A core behind the processors of its input and output. One thread at a time may use it.

    clock: the core's, in seconds. metrics: None: no records are kept. end_token_ids: None: the tokenizer's.
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
        """The engine that `config` describes, its model loaded. Raises ValueErrors that name the setting at fault."""
        from sarathi.engine.build import build_core, build_tokenizer  # import readers of checkpoints

        if config.cache.kv_budget_group is not None:
            raise ValueError(
                f"kv_budget_group is {config.cache.kv_budget_group!r}: an engine that shares its memory has a process "
                "of its own, as that of `sarathi serve` or AsyncLLM"
            )
        tokenizer, end_token_ids = build_tokenizer(config)
        return cls(build_core(config), tokenizer, end_token_ids=end_token_ids)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, if only release the memory of requests that have ended."""
        return not self._is_shut_down and self.core.has_work

    @property
    def num_unfinished(self) -> int:
        """Requests that have been added and have not ended."""
        return len(self._outputs.states)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether a request of this id has been added and has not ended."""
        return request_id in self._outputs.states

    def add_request(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams, arrival_time_s: float | None = None
    ) -> None:
        """Queue a prompt: text, or token ids. It is refused with a ValueError, and nothing else changes, where the id
        is in use, the prompt is empty or too long, or a parameter does not fit the model.

        arrival_time_s: when the request arrived, by the engine's clock; None: now.
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
        """Launch one batch and take the result of the oldest: outputs of the requests that got a token or ended.

        With an executor that has several steps in flight, the first call returns no output. Where anything raises, be
        it Ctrl-C, every request ends without a last output, the error goes on to the caller, and the engine takes new
        requests.
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
        """End a request now; its last output, or None if there is no such request (any more)."""
        state = self._outputs.states.get(request_id)
        if state is None:
            return None
        for completion in state.completions:
            self.core.finish(completion.request_id, "abort")
        return self._outputs.end(state, "abort")

    def release_ended(self) -> None:
        """Tell the executor of ended requests and freed memory where no other request is left to be computed."""
        while not self._outputs.states and not self._is_shut_down and self.core.has_work:
            self.step()

    def reset_prefix_cache(self) -> bool:
        """Forget the tokens of ended requests; False, with nothing done, while a request has not ended."""
        is_reset = self.core.reset_prefix_cache()
        if is_reset:
            self.release_ended()
        return is_reset

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Tokens found in the cache so far, and what is kept of ended requests."""
        return self.core.prefix_cache_stats()

    def memory_stats(self) -> MemoryStats:
        """Memory of the KV cache now."""
        return self.core.memory_stats()

    def shutdown(self) -> None:
        """End every request without a last output and free the model's and the cache's memory; the engine has no work
        and takes none afterwards. May be called again."""
        self._is_shut_down = True
        try:
            self.core.shutdown()
        finally:
            self._outputs.end_all("error")
