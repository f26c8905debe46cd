"""Every knob of the engine, with its default and its meaning.

A configuration is immutable: what is found at run time, such as the capacity of the cache, is not written to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sarathi.config.backend import AUTO, BackendSpec
from sarathi.config.knobs import ConfigError, Section, knob

SCHEDULERS = ("sarathi", "vllm", "orca", "faster_transformer", "simple_chunking")
CHUNKED_SCHEDULERS = ("sarathi", "simple_chunking")
EXECUTORS = (AUTO, "uniproc", "multiproc", "ray")
EVICTIONS = ("lru", "lfu")

DTYPES = (AUTO, "float32", "float16", "bfloat16")

_INT32_MAX, _INT63_MAX = 2**31 - 1, 2**63 - 1  # lengths and slots on the device; seeds of torch
_MOST_BYTES = 2**62
_GROUP = re.compile(r"[\w.-]+", re.ASCII)
_MOST_SEQS = 2**20  # each has a slot of the cache and its accounting, even when idle


@dataclass(frozen=True)
class ModelConfig(Section):
    """The model, its dtype, and its device."""

    model: str = knob("smollm2-135m", "model: a shipped name, a folder, a .gguf file, or a hub id")
    tokenizer: str | None = knob(None, "tokenizer: a folder or hub id; none: the model's own")
    dtype: str = knob(
        AUTO, "type of weights and activations; auto: the model's own on a GPU, float32 on a CPU", choices=DTYPES
    )
    device: str = knob(AUTO, "cpu, cuda or cuda:N; auto: a GPU where there is one")
    load_format: str = knob(
        AUTO, "how weights are stored; dummy: random weights, for measuring speed",
        choices=(AUTO, "safetensors", "gguf", "dummy"),
    )  # fmt: skip
    max_model_len: int | None = knob(
        None, "longest prompt plus output, in tokens; none: the model's own limit", low=2, high=_INT32_MAX
    )
    seed: int = knob(0, "seed of dummy weights and of requests that bring none", low=0, high=_INT63_MAX)
    attention_backend: BackendSpec = knob(  # noqa: RUF009 (a field, like the others)
        BackendSpec(), "kernel x memory, as fa_vattn_megacache_sync_2mb or sdpa_paged_16; auto: the fastest common one"
    )
    trust_remote_code: bool = knob(False, "run Python code that a model folder brings for its tokenizer")
    enforce_eager: bool = knob(False, "no CUDA graphs: every kernel of a step is started by itself, and can be timed")
    mapped_weights: bool = knob(
        False, "weights in memory that /sleep?level=2 gives back on a GPU too; on a CPU, where it always does, weights "
        "are then not packed, and products are slower",
    )  # fmt: skip


@dataclass(frozen=True)
class CacheConfig(Section):
    """Size and dtype of the KV cache, and prefix caching."""

    kv_cache_dtype: str = knob(
        AUTO, "type of keys and values in the cache; auto: that of the activations", choices=DTYPES
    )

    memory_bytes: int | None = knob(
        None,
        "budget of the KV cache on each device, as 8gb or in bytes; none: a share of what is free",
        low=1,
        high=_MOST_BYTES,
        unit="bytes",
    )
    kv_budget_group: str | None = knob(
        None, "servers of one user on one device that name the same group share memory_bytes as their total"
    )
    gpu_memory_utilization: float = knob(
        0.9, "share of the GPU's memory for weights, activations and cache together, where memory_bytes is none",
        low=0.01, high=1.0,
    )  # fmt: skip
    prefix_caching: bool = knob(
        True, "keep the tokens of ended requests while their memory is not needed, for prompts that begin alike"
    )
    prefix_eviction: str = knob(
        "lru", "which of them go first: least recently used, or least frequently", choices=EVICTIONS
    )
    cascade_attention: bool = knob(
        True, "where many running requests begin alike, decode attention reads what they share once a step, on a GPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.kv_budget_group
        if group is not None and not _GROUP.fullmatch(group):
            raise ConfigError(f"kv_budget_group is {group!r}: it must be letters, digits, '.', '_' and '-'")


@dataclass(frozen=True)
class ChunkBudgetConfig(Section):
    """Token budget of a step of a chunked scheduler."""

    policy: str = knob(
        "fixed",
        "fixed: chunk_size always; schedule: large chunks first, smaller ones as a prompt grows; "
        "latency: learned from the times of steps to meet target_step_s",
        choices=("fixed", "schedule", "latency"),
    )
    low_chunk_size: int = knob(64, "schedule, latency: fewest tokens of a step", low=1, high=_INT32_MAX)
    high_chunk_size: int = knob(2048, "schedule, latency: most tokens of a step", low=1, high=_INT32_MAX)
    chunk_schedule_max_tokens: int = knob(
        32768, "schedule: prompt tokens after which chunks are smallest", low=1, high=_INT32_MAX
    )
    chunk_schedule_stages: int = knob(
        16, "schedule: sizes between the largest and the smallest chunk", low=1, high=10_000
    )
    target_step_s: float = knob(0.05, "latency: seconds a step may take, and so the time between tokens", low=1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_chunk_size > self.high_chunk_size:
            raise ConfigError(
                f"low_chunk_size is {self.low_chunk_size}: it must not exceed high_chunk_size, {self.high_chunk_size}"
            )


@dataclass(frozen=True)
class SchedulerConfig(Section):
    """Scheduling policy, and the limits of a step."""

    type: str = knob("sarathi", "scheduling policy", choices=SCHEDULERS)
    max_num_seqs: int = knob(128, "requests that run at the same time, at most", low=1, high=_MOST_SEQS)
    chunk_size: int = knob(512, "token budget of a step (sarathi, simple_chunking)", low=1, high=_INT32_MAX)
    max_chunk_per_request: int | None = knob(
        None,
        "tokens that one prompt may take of a step, so that a long one leaves room; none: all of it",
        low=1,
        high=_INT32_MAX,
    )
    max_num_partial_prefills: int = knob(
        4, "prompts that may be in progress at the same time, at most", low=1, high=_INT32_MAX
    )
    rolling_prefills: bool = knob(True, "several prompts may share a step of a chunked scheduler; false: one a step")
    max_batched_tokens: int | None = knob(
        None, "tokens of a step where prompts go whole (vllm, orca, faster_transformer); a longer prompt goes alone; "
        "none: the model's limit", low=1, high=_INT32_MAX,
    )  # fmt: skip
    watermark: float = knob(
        0.01, "share of the cache left free when a request starts beside others, for these to grow into",
        low=0.0, high=0.5,
    )  # fmt: skip
    chunk_budget: ChunkBudgetConfig = field(default_factory=ChunkBudgetConfig)

    def max_step_tokens(self, max_model_len: int) -> int:
        """The most tokens that one step can hold, for sizing activations."""
        if self.type not in CHUNKED_SCHEDULERS:
            return max(self.max_batched_tokens or 0, max_model_len) + self.max_num_seqs
        fixed = self.chunk_budget.policy == "fixed"
        budget = self.chunk_size if fixed else max(self.chunk_budget.high_chunk_size, self.max_num_seqs)
        return min(budget, self.max_num_seqs * max_model_len)


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Tensor and pipeline parallelism, and the executor."""

    executor: str = knob(
        AUTO, "uniproc: one rank, in this process; multiproc: a process of this machine for each rank; "
        "ray: an actor for each, on any machines; auto: multiproc for several ranks", choices=EXECUTORS,
    )  # fmt: skip
    ray_placement: str = knob(
        "pack", "pack: ranks on as few machines of the Ray cluster as have room; strict_pack: on one",
        choices=("pack", "strict_pack"),
    )  # fmt: skip
    tensor_parallel_size: int = knob(1, "devices that share each layer", low=1, high=_INT32_MAX)
    pipeline_parallel_size: int = knob(1, "devices that take the layers in turn", low=1, high=_INT32_MAX)
    check_ranks_every: int | None = knob(
        None, "steps after which ranks are compared: requests, tokens, mapped lengths; for debugging; none: never",
        low=1, high=_INT32_MAX,
    )  # fmt: skip


@dataclass(frozen=True)
class TransferConfig(Section):
    """Disaggregated prefill (1P1D): some devices compute prompts and send keys and values to those that decode."""

    prefill_decode: bool = knob(
        False, "compute prompts on as many devices again, and send their keys and values to those that decode"
    )
    prefill_chunk_size: int | None = knob(
        None, "token budget of a step that computes prompts for others; none: chunk_size", low=1, high=_INT32_MAX
    )
    max_ranges: int = knob(
        64, "contiguous ranges that a prompt is sent in, at most, or one piece a layer where those are more",
        low=2, high=_INT32_MAX,
    )  # fmt: skip


@dataclass(frozen=True)
class EngineConfig(Section):
    """Everything an engine is built from."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
