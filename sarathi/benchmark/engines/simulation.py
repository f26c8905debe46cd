"""Simulation of prefix caching: real scheduler, prefix index, block manager and allocator, modelled step times."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sarathi.benchmark.engines.cache_only import CacheOnlyExecutor
from sarathi.benchmark.workload.prompts import PromptMaker
from sarathi.benchmark.workload.sharing import PrefixReuse, repeated_tokens
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.config.backend import BackendSpec
from sarathi.config.schema import SchedulerConfig
from sarathi.core.factory import make_block_space_manager
from sarathi.core.scheduler import make_scheduler
from sarathi.engine.core import EngineCore
from sarathi.messages import NewRequest, SchedulerOutput
from sarathi.sampling_params import SamplingParams
from sarathi.worker.cache_engine.base import KVCacheSpec

_BACKEND = BackendSpec.parse("sdpa_vattn_megacache_4kb")
_HEAD_SIZE = 32  # float32, one head and one layer: 128 bytes a token in each region, 32 tokens in a row
_SEED = 1


def llama_8b_step_s(out: SchedulerOutput) -> float:
    """Approximate step time of Llama-3-8B on an H200."""
    return 5e-3 + 25e-6 * out.num_tokens


@dataclass(frozen=True)
class SimulatedCache:
    """capacity_tokens: of the KV cache. max_num_seqs: running requests; four times as many are retained."""

    capacity_tokens: int
    policy: str = "lru"
    max_num_seqs: int = 256
    chunk_size: int = 8192

    def core(self, max_model_len: int, num_retained: int) -> EngineCore:
        """An engine core without a model."""
        spec = KVCacheSpec(1, 1, _HEAD_SIZE, torch.float32, self.max_num_seqs, max_model_len, 0, num_retained)
        executor = CacheOnlyExecutor(_BACKEND, spec, self.capacity_tokens * spec.token_bytes)
        manager = make_block_space_manager(_BACKEND, executor.capacity, self.policy)
        config = SchedulerConfig(max_num_seqs=self.max_num_seqs, chunk_size=self.chunk_size)
        return EngineCore(make_scheduler(config, manager, max_model_len), executor)


def simulate(
    specs: Sequence[RequestSpec], cache: SimulatedCache, step_s: Callable[[SchedulerOutput], float] = llama_8b_step_s
) -> PrefixReuse:
    """Serve requests in order of arrival on a simulated clock; returns how much of their prompts was cached.

    RuntimeError if the accounting of block manager or allocator is inconsistent at the end.
    """
    core = cache.core(max(spec.num_tokens for spec in specs) + 1, 4 * cache.max_num_seqs)
    prompts = PromptMaker(_SEED, core.executor.vocab_size)
    waiting, found, now_s = deque(enumerate(specs)), dict[str, int](), 0.0
    while waiting or core.has_work:
        now_s = now_s if core.has_work else max(now_s, waiting[0][1].arrived_at_s)
        while waiting and waiting[0][1].arrived_at_s <= now_s:
            number, spec = waiting.popleft()
            core.add_requests([_request(number, spec, prompts)])
        output = core.step()
        for update in output.updates:
            found[update.request_id] = max(found.get(update.request_id, 0), update.num_cached_tokens)
        now_s += step_s(output.step.out) if output.step is not None else 0.0
    core.scheduler.check_integrity()
    core.executor.check_integrity()
    core.shutdown()
    return repeated_tokens(specs)._replace(num_found=sum(found.values()))


def distinct_tokens(specs: Sequence[RequestSpec]) -> int:
    """Tokens, outputs included, that an unlimited cache holds after all requests."""
    reuse = repeated_tokens(specs)
    return reuse.num_prompt_tokens - reuse.num_repeated + sum(spec.num_decode_tokens for spec in specs)


def with_short_outputs(specs: Sequence[RequestSpec], divisor: int) -> list[RequestSpec]:
    """Shorten outputs to 1/divisor: decodes dominate the simulation's time and do not affect prefix hits."""
    return [replace(spec, num_decode_tokens=max(spec.num_decode_tokens // divisor, 1)) for spec in specs]


def _request(number: int, spec: RequestSpec, prompts: PromptMaker) -> NewRequest:
    params = SamplingParams(temperature=0.0, max_tokens=spec.num_decode_tokens, ignore_eos=True)
    return NewRequest(str(number), array("q", prompts.token_ids(spec, number)), params)
