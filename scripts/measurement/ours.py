"""Our engine behind the narrow door of serving.py. Knows no work."""

import gc
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count

import torch

from measurement.options import find_model
from sarathi import LLM, SamplingParams
from sarathi.core.block_space_manager import make_block_space_manager
from sarathi.core.scheduler import Scheduler, make_scheduler
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.messages import MemoryStats
from sarathi.metrics import MetricsStore

GREEDY = {"temperature": 0.0}


class OurEngine:
    """One LLM. Each row names the backend that was asked for."""

    def __init__(self, llm: LLM, backend: str) -> None:
        self._llm, self._built = llm, llm.engine
        self.engine = llm.engine
        self.backend = backend
        executor = llm.engine.core.executor
        self.vocab_size: int = executor.vocab_size
        self.max_model_len: int = executor.max_model_len
        self.max_num_seqs: int = llm.engine.core.scheduler.config.max_num_seqs
        self.capacity_tokens: int = executor.capacity.tokens_in(executor.capacity.rows)
        self.sampling = GREEDY  # parameters of the requests that are added from now on
        self._ids = map(str, count())

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def add(self, prompt: list[int], output_tokens: int) -> str:
        request_id = next(self._ids)
        params = SamplingParams(**self.sampling, max_tokens=output_tokens, ignore_eos=True)
        self.engine.add_request(request_id, prompt, params)
        return request_id

    def step(self) -> Iterable[tuple[str, int]]:
        return [(output.request_id, 1) for output in self.engine.step()]

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)

    def limit_step(self, tokens: int | None) -> None:
        """A second scheduler over the same executor: the step's budget is fixed where a scheduler is made."""
        executor, scheduler = self._built.core.executor, self._built.core.scheduler
        if tokens is not None:
            memory = make_block_space_manager(executor.backend, executor.capacity)
            scheduler = make_scheduler(replace(scheduler.config, chunk_size=tokens), memory, executor.max_model_len)
        self._take_over(scheduler)

    def record_metrics(self, *, on: bool) -> None:
        """Whether a metrics store sees all from now on. Only where no request is left."""
        self._take_over(self._built.core.scheduler, MetricsStore() if on else None)

    def _take_over(self, scheduler: Scheduler, metrics: MetricsStore | None = None) -> None:
        if self.has_work:
            raise RuntimeError("requests are under way: an engine takes over between them")
        self.engine = LLMEngine(EngineCore(scheduler, self._built.core.executor), None, metrics=metrics)

    def memory_stats(self) -> MemoryStats:
        return self._llm.memory_stats()

    def check_integrity(self) -> None:
        """Raises RuntimeError where the books of the scheduler or of the cache do not balance."""
        self._built.core.scheduler.check_integrity()
        self._built.core.executor.check_integrity()

    def resize(self, memory_bytes: int) -> None:
        """Let requests hold no more KV memory than this from now on."""
        self._built.core.scheduler.resize(memory_bytes // self._row_bytes)

    @property
    def budget_bytes(self) -> int:
        """Of the KV cache, in whole rows."""
        return self._built.core.executor.capacity.rows * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        executor = self._built.core.executor
        return executor.token_bytes * executor.capacity.page_bytes // executor.capacity.token_bytes

    @property
    def num_running(self) -> int:
        return self.engine.core.scheduler.num_running

    @property
    def num_preemptions(self) -> int:
        return self.engine.core.scheduler.num_preemptions

    def close(self) -> None:
        """Give all memory back, weights included: the next engine's budget is what the driver calls free."""
        self._llm.close()
        del self._llm, self._built, self.engine
        gc.collect()
        torch.cuda.empty_cache()


def open_engine(options: Namespace, backend: str) -> OurEngine:
    """The engine of a script's options (see options.py) with random weights."""
    chosen: dict[str, object] = {
        "model": find_model(options.model), "load_format": "dummy", "attention_backend": backend,
        "chunk_size": options.chunk_size,
        "max_model_len": options.max_model_len, "max_num_seqs": options.max_num_seqs,
        "memory_bytes": options.memory_bytes, "device": options.device,
    }  # fmt: skip
    return OurEngine(LLM(**chosen), backend)
