"""Which runner takes a model's steps, and how much memory it leaves for the cache; knows no requests."""

from collections.abc import Sequence
from itertools import takewhile

import torch

from sarathi.config.backend import BackendSpec
from sarathi.config.schema import EngineConfig
from sarathi.messages import Chunk, NewRequest, SchedulerOutput
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.models.fused import FusedDecoder
from sarathi.model_executor.ops import create_ops
from sarathi.sampling_params import SamplingParams
from sarathi.worker.cache_engine.base import CacheEngine, CacheShape
from sarathi.worker.cuda_graphs import Limits
from sarathi.worker.cuda_runner import CudaModelRunner
from sarathi.worker.device import cache_budget_bytes
from sarathi.worker.model_runner import ModelRunner
from sarathi.worker.sequences import SequenceTable

Runner = ModelRunner | CudaModelRunner
_STEP_TOKENS = (*range(64, 1025, 64), 1536, 2048, 3072, 4096, 8192)  # by which products differ in their kernels
_PROMPTS = 16  # in one step: so many that attention shares none of them out over the device
_SHORT_PROMPT = 16  # tokens
_START_TOKENS = 32768  # of the largest step, on virtual memory that grows once the driver has said what is left
_START_BYTES = 4 * 2**30  # room for the pages of many regions beside them


def create_runner(
    model: Decoder, backend: AttentionBackend, cache: CacheEngine, shape: CacheShape, spec: BackendSpec
) -> Runner:
    """Fused kernels, graphs and overlap on a GPU, where kernel and architecture allow; else the plain steps."""
    arch, device = shape.arch, shape.place.device
    layers = [CacheLayer(*cache.layer(index), arch.window_of(index)) for index in range(arch.num_layers)]
    if device.type != "cuda" or not FusedDecoder.supports(arch):
        return ModelRunner(model, backend, cache, layers, prefetch=not spec.sync)
    fused = FusedDecoder(model, arch, create_ops(device), backend, shape.max_model_len)
    blocks = -(-shape.max_model_len // layers[0].k.shape[1]) if spec.is_paged else 0
    limits = Limits(shape.max_num_seqs, shape.max_model_len, blocks)
    return CudaModelRunner(fused, backend, cache, layers, prefetch=not spec.sync, limits=limits)


def size_cache(runner: Runner, cache: CacheEngine, config: EngineConfig, shape: CacheShape) -> None:
    """Runs steps of many sizes and captures the graphs, where wanted; what the driver then calls free is free indeed.

    The largest step takes what memory a step can take. The others have the libraries load their kernels now: to load
    one at its first use stops the device for a step.
    """
    if not isinstance(runner, CudaModelRunner):
        return
    max_tokens = config.scheduler.max_step_tokens(shape.max_model_len)
    _run(runner, cache, largest_step(max_tokens, shape), shape)
    runner.warm_up()
    if not config.model.enforce_eager:
        _run(runner, cache, [_SHORT_PROMPT] * min(_PROMPTS, shape.max_num_seqs), shape)
        for tokens in takewhile(max_tokens.__gt__, _STEP_TOKENS):
            _run(runner, cache, [tokens], shape)
        runner.capture()
    if config.cache.memory_bytes is None:
        cache.resize(shape.budget_bytes + cache_budget_bytes(config.cache, shape.place.device))


def largest_step(max_tokens: int, shape: CacheShape) -> list[int]:
    """Tokens of the prompts that fill a step: each as long as a prompt can be, and the rest."""
    longest = shape.max_model_len - 1
    rest = max_tokens % longest
    return ([longest] * (max_tokens // longest) + ([rest] if rest else []))[: shape.max_num_seqs]


def _run(runner: CudaModelRunner, cache: CacheEngine, prompts: Sequence[int], shape: CacheShape) -> None:
    """A step of prompts of so many tokens each, or of as many as fit, on memory that goes back at once."""
    capacity, rows = cache.capacity, 0
    sequences, chunks = SequenceTable(0), []
    for number, tokens in enumerate(prompts):
        length = min(tokens, shape.max_model_len - 1, capacity.tokens_in(capacity.rows - rows))
        if length < 1:
            break
        request_id, blocks = f"warm-up-{number}", range(rows, rows + capacity.rows_for(length))
        sequences.add([NewRequest(request_id, (0,) * length, SamplingParams(temperature=0.0))])
        chunks.append(Chunk(request_id, 0, length, True, length, tuple(blocks)))
        rows = blocks.stop
    cache.prepare(chunks)
    runner.launch(SchedulerOutput(0, chunks=tuple(chunks)), sequences).result()
    torch.cuda.synchronize()
    cache.release([chunk.request_id for chunk in chunks])


def initial_budget_bytes(spec: BackendSpec, config: EngineConfig, token_bytes: int, device: torch.device) -> int:
    """What the cache starts with: on a GPU only enough for the largest step, where it can grow afterwards.

    token_bytes: of one token in all layers.
    """
    budget = cache_budget_bytes(config.cache, device)
    if device.type != "cuda" or spec.is_paged or config.cache.memory_bytes is not None:
        return budget
    return min(budget, _START_BYTES + _START_TOKENS * token_bytes)
