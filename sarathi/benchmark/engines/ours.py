"""This engine behind the interface of load.py."""

import gc
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from sarathi import LLM, SamplingParams
from sarathi.config.backend import BackendSpec
from sarathi.core.factory import make_block_space_manager
from sarathi.core.scheduler import Scheduler, make_scheduler
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.messages import MemoryStats
from sarathi.metrics import MetricsStore

GREEDY: dict[str, Any] = {"temperature": 0.0}


_COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 1000, "intermediate_size": 512,
}  # fmt: skip
SMALL_MODELS = {
    "tiny": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "two-wide-layers": {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8},
}


def find_model(name: str) -> str:
    """The name, or for one of SMALL_MODELS a new folder with its configuration and no tokenizer."""
    if name not in SMALL_MODELS:
        return name
    folder = Path(tempfile.mkdtemp(prefix="small-model-"))
    (folder / "config.json").write_text(json.dumps({**_COMMON, **SMALL_MODELS[name]}))
    return str(folder)


class OurEngine:
    """An LLM with random weights. backend: the requested name, used in every record."""

    def __init__(self, llm: LLM, backend: str) -> None:
        self.engine, self.backend = llm.engine, backend
        self._llm, self._built = llm, _core(llm.engine)
        self._executor: Any = self._built.executor
        facts = self._built.facts
        self.vocab_size, self.max_model_len = facts.vocab_size, facts.max_model_len
        self.max_num_seqs: int = self._built.scheduler.config.max_num_seqs
        self.capacity_tokens: int = facts.capacity.tokens_in(facts.capacity.rows)
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

    def step(self) -> Iterable[tuple[str, Sequence[int]]]:
        return [(output.request_id, output.outputs[0].token_ids[-1:]) for output in self.engine.step()]

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)

    def limit_step(self, tokens: int | None) -> None:
        """Create another scheduler over the same executor: the token budget is fixed at construction."""
        scheduler = self._built.scheduler
        if tokens is not None:
            memory = make_block_space_manager(BackendSpec.parse(self.backend), self._executor.capacity)
            scheduler = make_scheduler(replace(scheduler.config, chunk_size=tokens), memory, self.max_model_len)
        self._take_over(scheduler)

    def record_metrics(self, *, on: bool) -> None:
        """Switch the metrics store on or off. Requires an idle engine."""
        self._take_over(self._built.scheduler, MetricsStore() if on else None)

    def _take_over(self, scheduler: Scheduler, metrics: MetricsStore | None = None) -> None:
        if self.has_work:
            raise RuntimeError("the scheduler cannot be replaced while requests are unfinished")
        self.engine = LLMEngine(EngineCore(scheduler, self._executor), None, metrics=metrics)

    def memory_stats(self) -> MemoryStats:
        return self._llm.memory_stats()

    def check_integrity(self) -> None:
        """RuntimeError if the accounting of the scheduler or of the cache is inconsistent."""
        self._built.scheduler.check_integrity()
        self._executor.check_integrity()

    def resize(self, memory_bytes: int) -> None:
        """Limit the KV memory of requests."""
        self._built.resize(memory_bytes // self._row_bytes)

    @property
    def budget_bytes(self) -> int:
        """Size of the KV cache, a whole number of rows."""
        return self._built.facts.capacity.rows * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        facts = self._built.facts
        return facts.token_bytes * facts.capacity.page_bytes // facts.capacity.token_bytes

    @property
    def num_running(self) -> int:
        return _core(self.engine).scheduler.num_running

    @property
    def num_preemptions(self) -> int:
        return _core(self.engine).scheduler.num_preemptions

    def close(self) -> None:
        """Free all memory including weights: the next engine sizes its cache from what the driver reports as free."""
        self._llm.close()
        del self._llm, self._built, self._executor, self.engine
        gc.collect()
        torch.cuda.empty_cache()


def _core(engine: LLMEngine) -> EngineCore:
    """The engine core, in this process."""
    assert isinstance(engine.core, EngineCore)
    return engine.core


def open_engine(options: Namespace, backend: str, **knobs: Any) -> OurEngine:
    """Build an engine with random weights from a script's options (config/program.py) and further knobs.

    Prefix caching is off by default: scripts measure the same prompts several times.
    """
    chosen: dict[str, Any] = {
        "model": find_model(options.model), "load_format": "dummy", "attention_backend": backend,
        "chunk_size": options.chunk_size,
        "max_model_len": options.max_model_len, "max_num_seqs": options.max_num_seqs,
        "memory_bytes": options.memory_bytes, "device": options.device,
        "tensor_parallel_size": options.tensor_parallel_size, "prefix_caching": False,
    }  # fmt: skip
    return OurEngine(LLM(**chosen | knobs), backend)
