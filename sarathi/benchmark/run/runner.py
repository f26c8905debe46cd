"""The engine of one replica, built from a benchmark configuration, and its runs.

One runner serves many workloads: a capacity search loads the model once.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sarathi.benchmark.config.engine import engine_config
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.run.operations import OperationProbe, ProbedExecutor
from sarathi.benchmark.run.outcome import INTERRUPTED, Planned, RunOutcome
from sarathi.benchmark.run.profiling import profile_window
from sarathi.benchmark.run.serving_loop import Listener, NumberedSpec, ServingLoop
from sarathi.benchmark.workload import RequestSpec, generate_requests
from sarathi.benchmark.workload.prompts import PromptMaker
from sarathi.benchmark.workload.sharing import repeated_tokens
from sarathi.config.knobs import ConfigError
from sarathi.config.schema import EngineConfig
from sarathi.engine.build import build_scheduler, build_tokenizer
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.engine.outputs import RequestOutput
from sarathi.entrypoints.progress import RequestBar
from sarathi.executor.base import Executor
from sarathi.executor.factory import create_executor
from sarathi.executor.uniproc import UniprocExecutor
from sarathi.metrics import MetricsStore

WARM_UP_TOKENS = 16  # of a short prompt


class BenchmarkRunner:
    """Close it, or use it in a `with`."""

    def __init__(
        self, config: BenchmarkConfig, replica: int = 0, device: str | None = None,
        stop: threading.Event | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """device: in place of model.device, for one replica of several. stop: ends a run as ^C does.

        clock: seconds; the same for all replicas.
        """
        self._config, self._replica, self._stop, self._clock = config, replica, stop, clock
        settings = engine_config(config, device)
        tokenizer, end_token_ids = build_tokenizer(settings)
        executor = create_executor(settings)
        self._store = _make_store(config, replica, settings, executor, clock) if config.write_metrics else None
        core = EngineCore(build_scheduler(settings, executor), _timed(config, executor, self._store), clock)
        self._engine = LLMEngine(core, tokenizer, clock, self._store, end_token_ids)
        encode = None if tokenizer is None else tokenizer.encode
        self._count_tokens: Callable[[str], int] | None = None if encode is None else lambda text: len(encode(text))
        self._prompts = PromptMaker(config.seed, executor.vocab_size, encode)
        self._is_warm = False

    def workload(self, config: BenchmarkConfig | None = None) -> list[RequestSpec]:
        """Requests of all replicas together: as configured, or as another configuration of the same engine asks."""
        return generate_requests(config or self._config, self._count_tokens)

    def warm_up(self, specs: Sequence[RequestSpec]) -> None:
        """Serve the first few requests and short ones beside them, all at once, and forget them.

        The short ones end one after another: kernels have met every batch size, and decodes beside a prompt.
        Raises KeyboardInterrupt on ^C. Only the first call does anything.
        """
        if self._is_warm:
            return
        config = self._config
        short = [RequestSpec(0.0, WARM_UP_TOKENS, 2 + index) for index in range(config.num_warmup_batch_sizes)]
        like = specs[: config.num_warmup_requests]
        first = [*short, *(replace(spec, arrived_at_s=0.0, block_ids=(), conversation=None) for spec in like)]
        loop = self._loop(lambda outputs: None, keep_responses=False)
        served = loop.serve([NumberedSpec(number, spec) for number, spec in enumerate(first)], math.inf, self._clock)
        if served.ended == INTERRUPTED:
            raise KeyboardInterrupt
        self._is_warm = True

    def run(self, specs: Sequence[RequestSpec], profile_folder: Path | None = None) -> RunOutcome:
        """Serve this replica's share of `specs`; ends early at the time limit or at ^C, with what there is."""
        self.warm_up(specs)
        share = self._share(specs)
        limit_s = self._config.time_limit or math.inf
        with ExitStack() as stack:
            listeners = self._listeners(stack, len(share), profile_folder)
            loop = self._loop(_tell_all(listeners), self._config.metrics_store.enable_request_outputs)
            if self._store is not None:
                self._store.reset()
                self._store.on_memory(self._engine.memory_stats())
            served = loop.serve(share, limit_s, self._clock)
        if self._store is not None:
            self._store.on_memory(self._engine.memory_stats())
        records = None if self._store is None else self._store.records()
        facts = self._engine.core.facts
        engine = {**facts.resolution._asdict(), "kv_cache_tokens": facts.num_cache_tokens}
        found = dict(vars(served))
        reuse = repeated_tokens(each.spec for each in share)._replace(num_found=found.pop("num_cached_tokens"))
        return RunOutcome(records=records, requests=self.planned(specs), engine=engine, reuse=reuse, **found)

    def planned(self, specs: Sequence[RequestSpec]) -> Planned:
        """This replica's share of `specs`, without their prompts."""
        return tuple((each.number, replace(each.spec, text=None, block_ids=())) for each in self._share(specs))

    def _loop(self, listener: Listener, keep_responses: bool) -> ServingLoop:
        return ServingLoop(self._engine, self._prompts, listener, keep_responses, self._stop)

    def _share(self, specs: Sequence[RequestSpec]) -> list[NumberedSpec]:
        """Every n-th request; of conversations, every n-th of them with all of its turns."""
        numbered = [NumberedSpec(number, spec) for number, spec in enumerate(specs)]
        return [each for each in numbered if each.place % self._config.cluster.num_replicas == self._replica]

    def close(self) -> None:
        """Give the engine's memory back."""
        self._engine.shutdown()

    def __enter__(self) -> BenchmarkRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listeners(self, stack: ExitStack, num_requests: int, profile_folder: Path | None) -> list[Listener]:
        config = self._config
        label = str(config.model.attention_backend)
        if config.cluster.num_replicas > 1:
            label += f", replica {self._replica}"
        bar = stack.enter_context(RequestBar(num_requests, label, config.show_progress))
        listeners: list[Listener] = [lambda outputs: bar.add(sum([each.finished for each in outputs]), len(outputs))]
        if self._store is not None:
            listeners.append(_MemorySampler(self._engine, self._store, config.metrics_store.memory_interval_steps))
        if config.enable_profiling and profile_folder is not None:
            path = profile_folder / f"profile_{self._replica}.json"
            listeners.append(stack.enter_context(profile_window(path, config.profiling)))
        return listeners


class _MemorySampler:
    """Looks at the cache's memory every few steps."""

    def __init__(self, engine: LLMEngine, store: MetricsStore, interval_steps: int) -> None:
        self._engine, self._store, self._interval = engine, store, interval_steps
        self._num_steps = 0

    def __call__(self, outputs: Sequence[RequestOutput]) -> None:
        if self._num_steps % self._interval == 0:
            self._store.on_memory(self._engine.memory_stats())
        self._num_steps += 1


def _tell_all(listeners: Sequence[Listener]) -> Listener:
    def tell(outputs: Sequence[RequestOutput]) -> None:
        for listener in listeners:
            listener(outputs)

    return tell


def _timed(config: BenchmarkConfig, executor: Executor, store: MetricsStore | None) -> Executor:
    """The executor, with its operations timed where that is asked for."""
    if store is None or not config.metrics_store.enable_op_level_metrics:
        return executor
    if not isinstance(executor, UniprocExecutor):
        raise ConfigError("metrics_store.enable_op_level_metrics is true: it needs one rank, in this process")
    return ProbedExecutor(executor, OperationProbe(executor.model), store)


def _make_store(
    config: BenchmarkConfig, replica: int, settings: EngineConfig, executor: Executor, clock: Callable[[], float]
) -> MetricsStore:
    page_bytes = None if settings.model.attention_backend.is_paged else executor.capacity.page_bytes
    return MetricsStore(
        clock, replica=replica, capacity=executor.capacity, page_bytes=page_bytes,
        keep_schedule=config.write_json_trace,
    )  # fmt: skip
