"""Creates the runner of a model, and warms it up before the first request."""

from array import array
from collections.abc import Sequence
from itertools import takewhile

import torch

from sarathi.config.schema import EngineConfig
from sarathi.messages import CacheCapacity, Chunk, NewRequest, SchedulerOutput
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.parallel.ranks import Ranks
from sarathi.sampling_params import SamplingParams
from sarathi.worker.cache_engine.base import CacheEngine, KVCacheSpec
from sarathi.worker.cuda_graphs import Limits
from sarathi.worker.cuda_runner import CudaModelRunner
from sarathi.worker.model_runner import ModelRunner
from sarathi.worker.sequences import SequenceTable
from sarathi.worker.stage_runner import StageModelRunner

_STEP_TOKENS = (*range(64, 1025, 64), 1536, 2048, 3072, 4096, 8192)  # sizes between which cuBLAS changes its kernels
_PROMPTS = 16  # in one step: so many that attention does not split any of them over the device
_SHORT_PROMPT = 16  # tokens


def create_runner(
    model: Decoder, backend: AttentionBackend, cache: CacheEngine, arch: ModelArchitecture, spec: KVCacheSpec,
    ranks: Ranks,
) -> ModelRunner:  # fmt: skip
    """CUDA graphs and overlapping steps on a GPU, eager steps elsewhere."""
    layers = [CacheLayer(*cache.layer(index), arch.window_of(index)) for index in range(arch.num_layers)]
    if model.place.device.type != "cuda":
        several = ranks.num_stages > 1
        return (
            StageModelRunner(model, backend, cache, layers, ranks)
            if several
            else ModelRunner(model, backend, cache, layers)
        )
    blocks = -(-spec.max_model_len // cache.block_size) if cache.block_size else 0
    can_capture = bool(ranks.least(backend.can_capture(layers[0])))  # strides may differ between stages
    limits = Limits(spec.max_num_seqs, spec.max_model_len, blocks, can_capture, backend.cascade)
    return CudaModelRunner(model, backend, cache, layers, limits)


def warm_up(
    runner: ModelRunner, cache: CacheEngine, capacity: CacheCapacity, config: EngineConfig, spec: KVCacheSpec
) -> None:
    """Run steps of many sizes and capture CUDA graphs; the memory that is free afterwards stays free.

    The largest step allocates as much as any step can. The others make the libraries load their kernels, which would
    otherwise stop the device at their first use. capacity: the same on all ranks, which run the same steps.
    """
    if not isinstance(runner, CudaModelRunner):
        return
    max_tokens = config.scheduler.max_step_tokens(spec.max_model_len)
    _run(runner, cache, capacity, largest_step(max_tokens, spec), spec)
    runner.warm_up()
    if not config.model.enforce_eager:
        _run(runner, cache, capacity, [_SHORT_PROMPT] * min(_PROMPTS, spec.max_num_seqs), spec)
        for tokens in takewhile(max_tokens.__gt__, _STEP_TOKENS):
            _run(runner, cache, capacity, [tokens], spec)
        runner.capture(max_tokens)


def largest_step(max_tokens: int, spec: KVCacheSpec) -> list[int]:
    """Lengths of the prompts that fill a step: as many of the longest as fit, and the rest."""
    longest = spec.max_model_len - 1
    rest = max_tokens % longest
    return ([longest] * (max_tokens // longest) + ([rest] if rest else []))[: spec.max_num_seqs]


def _run(
    runner: CudaModelRunner, cache: CacheEngine, capacity: CacheCapacity, prompts: Sequence[int], spec: KVCacheSpec
) -> None:
    """Run a step of prompts of these lengths, as far as they fit, on memory that is released at once."""
    rows = 0
    sequences, chunks = SequenceTable(0), []
    for number, tokens in enumerate(prompts):
        length = min(tokens, spec.max_model_len - 1, capacity.tokens_in(capacity.rows - rows))
        if length < 1:
            break
        request_id, blocks = f"warm-up-{number}", range(rows, rows + capacity.rows_for(length))
        sequences.add([NewRequest(request_id, array("q", bytes(8 * length)), SamplingParams(temperature=0.0))])
        chunks.append(Chunk(request_id, 0, length, True, length, tuple(blocks)))
        rows = blocks.stop
    cache.prepare(chunks)
    runner.launch(SchedulerOutput(0, chunks=tuple(chunks)), sequences).result()
    torch.cuda.synchronize()
    cache.release([chunk.request_id for chunk in chunks])
