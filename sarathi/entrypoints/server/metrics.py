"""Prometheus metrics: request metrics are updated with each output, engine metrics at each scrape."""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from sarathi.engine.async_llm import AsyncLLM
from sarathi.engine.core_process.link import CoreDiedError
from sarathi.engine.outputs import RequestMetrics, RequestOutput
from sarathi.messages import CoreStats

_PREFIX = "sarathi:"
_STATS_TIMEOUT_S = 2.0
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
_GAUGES: dict[str, tuple[str, Callable[[CoreStats], float]]] = {
    "num_requests_running": ("Requests that hold memory", lambda stats: stats.num_running),
    "num_requests_waiting": ("Requests in the scheduler's queue", lambda stats: stats.num_waiting),
    "kv_cache_usage_perc": (
        "Fraction of the KV cache that requests use, 0 to 1",
        lambda stats: stats.used_rows / max(stats.total_rows, 1),
    ),
    "prefix_cache_retained_rows": (
        "Rows that only finished requests hold; reclaimed on demand",
        lambda stats: stats.prefixes.num_retained_rows,
    ),
    "kv_cache_reserved_bytes": ("Virtual address space of the KV cache", lambda stats: stats.memory.reserved_bytes),
    "kv_cache_created_bytes": ("Physical memory of the KV cache", lambda stats: stats.memory.created_bytes),
    "kv_cache_mapped_bytes": ("Physical memory that is mapped", lambda stats: stats.memory.mapped_bytes),
    "kv_cache_pooled_bytes": (
        "Mapped memory that no request uses",
        lambda stats: stats.memory.idle_bytes,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[CoreStats], float]]] = {
    "num_preemptions": ("Preempted requests", lambda stats: stats.num_preemptions),
    "kv_cache_mapping_seconds": ("Seconds spent in calls that map memory", lambda stats: stats.memory.driver_s),
    "kv_cache_mapping_calls": ("Calls that map memory", lambda stats: stats.memory.driver_calls),
    "prefix_cache_queries": (
        "Tokens looked up in the prefix cache",
        lambda stats: stats.prefixes.num_queried_tokens,
    ),
    "prefix_cache_hits": ("Tokens found in the prefix cache", lambda stats: stats.prefixes.num_hit_tokens),
    "prefix_cache_mapped_tokens": (
        "Cached tokens shared by mapping",
        lambda stats: stats.prefixes.num_mapped_tokens,
    ),
    "prefix_cache_copied_tokens": ("Cached tokens shared by copying", lambda stats: stats.prefixes.num_copied_tokens),
    "prefix_cache_evicted_rows": (
        "Rows taken from finished requests",
        lambda stats: stats.prefixes.num_evicted_rows,
    ),
    "steps_waited_for_page": ("Steps that waited for a page", lambda stats: stats.memory.steps_waited),
}


class ServerMetrics:
    """All metrics of one model, in a registry of their own.

    folder: PROMETHEUS_MULTIPROC_DIR when prometheus_client was imported: several API processes add up their counts
    there, and each of them exposes the sums. None: only this process counts.
    """

    def __init__(self, model_name: str, folder: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._folder = folder
        self._model_name = model_name
        self._core = _CoreCollector(model_name)
        self.registry.register(self._core)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, counted at the first output token")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens")
        self._finished = Counter(
            f"{_PREFIX}request_success", "Finished completions by finish reason", ("model_name", "finished_reason"),
            registry=self.registry,
        )  # fmt: skip
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token")
        self._itl = self._histogram("inter_token_latency_seconds", "Between two outputs of a request")
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end")
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step")
        self._prefill = self._histogram("request_prefill_time_seconds", "From the first step to the first token")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the end")
        self._progress: dict[str, _Progress] = {}
        self.num_tokens = (0, 0)
        """Tokens of prompts and of outputs so far."""

    def observe(self, output: RequestOutput) -> None:
        """Record an output of a request at the current time."""
        now_s = time.monotonic()
        num_tokens = sum([each.num_tokens for each in output.outputs])
        progress = self._progress.get(output.request_id)
        if progress is not None:
            if num_tokens > progress.num_tokens:
                self._itl.observe(now_s - progress.last_token_s)
                self._count(0, num_tokens - progress.num_tokens)
                progress.num_tokens, progress.last_token_s = num_tokens, now_s
        elif num_tokens:
            self._progress[output.request_id] = _Progress(num_tokens, now_s)
            self._observe_first(output, num_tokens)
        if output.finished:
            self._progress.pop(output.request_id, None)
            self._observe_end(output)

    async def refresh(self, llm: AsyncLLM) -> None:
        """Fetch the statistics of the engine process; waits at most two seconds."""
        try:
            self._core.stats = await asyncio.wait_for(llm.stats(), _STATS_TIMEOUT_S)
        except (CoreDiedError, asyncio.TimeoutError):
            return

    def expose(self) -> tuple[bytes, str]:
        """The metrics as text, and the content type."""
        registry = self.registry
        if self._folder is not None:
            registry = _shared_registry(self._folder)
            registry.register(self._core)
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _observe_first(self, output: RequestOutput, num_tokens: int) -> None:
        times = output.metrics
        self._count(len(output.prompt_token_ids), num_tokens)
        assert times.first_token_time_s is not None
        self._ttft.observe(times.first_token_time_s - times.arrival_time_s)
        if times.first_scheduled_time_s is not None:
            self._queue.observe(times.first_scheduled_time_s - times.arrival_time_s)
            self._prefill.observe(times.first_token_time_s - times.first_scheduled_time_s)

    def _count(self, num_prompt: int, num_output: int) -> None:
        if num_prompt:
            self._prompt_tokens.inc(num_prompt)
        self._generation_tokens.inc(num_output)
        self.num_tokens = self.num_tokens[0] + num_prompt, self.num_tokens[1] + num_output

    def _observe_end(self, output: RequestOutput) -> None:
        for each in output.outputs:
            self._finished.labels(self._model_name, each.finish_reason).inc()
        self._observe_length(output.metrics)

    def _observe_length(self, times: RequestMetrics) -> None:
        if times.finish_time_s is not None and times.first_token_time_s is not None:
            self._e2e.observe(times.finish_time_s - times.arrival_time_s)
            self._decode.observe(times.finish_time_s - times.first_token_time_s)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(_PREFIX + name, text, ("model_name",), registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str) -> Histogram:
        histogram = Histogram(_PREFIX + name, text, ("model_name",), registry=self.registry, buckets=_SECONDS)
        return histogram.labels(self._model_name)


class SharedCounts:
    """Sums of the counters of all processes that share a folder."""

    def __init__(self, folder: Path) -> None:
        self._registry = _shared_registry(folder)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens of prompts and of outputs so far."""
        return self._total("prompt_tokens"), self._total("generation_tokens")

    def _total(self, name: str) -> int:
        families = [each for each in self._registry.collect() if each.name == _PREFIX + name]
        return int(sum([sample.value for each in families for sample in each.samples]))


def _shared_registry(folder: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return registry


@dataclass(slots=True)
class _Progress:
    num_tokens: int
    last_token_s: float


class _CoreCollector(Collector):
    """The last statistics of the engine process."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.stats: CoreStats | None = None

    def collect(self) -> Iterable[Metric]:
        if self.stats is None:
            return
        for family, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (text, value) in table.items():
                metric = family(_PREFIX + name, text, labels=("model_name",))
                metric.add_metric((self._model_name,), value(self.stats))
                yield metric
