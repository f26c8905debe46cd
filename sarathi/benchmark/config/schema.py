"""Every knob of a benchmark run, in Sarathi-Serve's sections and by its names.

`python -m sarathi.benchmark.config.document` generates default.yml and the README's table from this module.
"""

from __future__ import annotations

from dataclasses import dataclass

from sarathi.config.backend import AUTO, BackendSpec
from sarathi.config.knobs import ConfigError, Section, knob
from sarathi.config.schema import EVICTIONS, SCHEDULERS, CacheConfig

LENGTH_PROVIDERS = ("fixed", "uniform", "zipf", "trace", "prefix_repetition", "multi_turn")
INTERVAL_PROVIDERS = ("static", "poisson", "gamma", "trace")
# Limits that a machine can hold: prompts are lists of ids, requests objects, replicas processes.
_TOKENS, _REQUESTS, _REPLICAS, _STEPS = 2**24, 2**22, 256, 2**31 - 1
_SARATHI_SERVE_BACKENDS = {"flash_attention": "fa_paged"}  # its only backend, as its default.yml names it
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class ClusterConfig(Section):
    """How many engines share the requests."""

    num_replicas: int = knob(
        1, "engines, each in a process of its own; request i goes to replica i mod n", low=1, high=_REPLICAS
    )
    executor: str = knob(
        "multiproc", "where replicas and their ranks run; multiproc: processes of this machine; ray: actors of a Ray "
        "cluster, over its machines", choices=("multiproc", "ray"),
    )  # fmt: skip


@dataclass(frozen=True)
class BenchmarkModelConfig(Section):
    """Model and KV cache."""

    name: str = knob("smollm2-135m", "model: a shipped name, a folder, a .gguf file, or a hub id")
    tokenizer: str | None = knob(None, "tokenizer: a folder or hub id; none: the model's own")
    tensor_parallel_degree: int = knob(1, "devices that share each layer", low=1)
    pipeline_parallel_degree: int = knob(1, "pipeline stages, one device each", low=1)
    max_model_len: int | None = knob(
        None, "maximum prompt plus output tokens; none: the model's limit", low=2, high=_TOKENS
    )
    load_format: str = knob(
        "dummy",
        "weight format; dummy: random weights, for speed tests; auto: the model's own",
        choices=(AUTO, "safetensors", "gguf", "dummy"),
    )
    attention_backend: str = knob(AUTO, "kernel x memory, as fa_vattn_megacache_sync_2mb or sdpa_paged_16")
    block_size: str | None = knob(
        None, "page of virtual memory in bytes, or tokens of a block; none: as in the backend's name"
    )
    dtype: str = knob(AUTO, "type of weights and cache", choices=(AUTO, "float32", "float16", "bfloat16"))
    device: str = knob(AUTO, "cpu, cuda or cuda:N; auto: a GPU where there is one")
    kv_cache_bytes: int | None = knob(
        None, "budget of the KV cache, as 8gb or in bytes; none: a share of what is free", low=1, unit="bytes"
    )
    prefix_caching: bool = knob(  # off: the originals have none, and runs that share an engine repeat their prompts
        False, "reuse the cache of finished requests for prompts with the same prefix; off, unlike the engine's default"
    )
    prefix_eviction: str = knob(
        CacheConfig.prefix_eviction, "eviction policy of cached prefixes: least recently or least frequently used",
        choices=EVICTIONS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        name = _SARATHI_SERVE_BACKENDS.get(self.attention_backend.lower(), self.attention_backend)
        object.__setattr__(self, "attention_backend", str(BackendSpec.parse(name)))


@dataclass(frozen=True)
class RequestGeneratorConfig(Section):
    """Where requests come from."""

    provider: str = knob(
        "synthetic", "synthetic: lengths and intervals by their own providers; trace: both from one file",
        choices=("synthetic", "trace"),
    )  # fmt: skip


@dataclass(frozen=True)
class SyntheticRequestGeneratorConfig(Section):
    """Requests with synthetic lengths and intervals."""

    length_provider: str = knob("trace", "where lengths come from", choices=LENGTH_PROVIDERS)
    interval_provider: str = knob(
        "static", "when requests arrive; static: all at once, at time zero", choices=INTERVAL_PROVIDERS
    )
    num_requests: int | None = knob(
        None, "number of requests; a replay is truncated to it; none: 64, or the whole replay", low=1, high=_REQUESTS
    )


@dataclass(frozen=True)
class TraceRequestGeneratorConfig(Section):
    """Replay of a file with arrival times and lengths."""

    trace_file: str | None = knob(
        None, "CSV (arrived_at,num_prefill_tokens,num_decode_tokens, or Time,PromptTokenCount,CompletionTokenCount) "
        "or Mooncake JSONL",
    )  # fmt: skip
    date: str | None = knob(None, "only rows with this Date; none: all")
    prefill_scale_factor: float = knob(1.0, "multiplies prompt lengths", low=0)
    decode_scale_factor: float = knob(1.0, "multiplies output lengths", low=0)
    time_scale_factor: float = knob(1.0, "multiplies arrival times: 0.5 doubles the load", low=0)
    max_tokens: int = knob(32768, "limit on prompt plus output; longer prompts are truncated", low=2, high=_TOKENS)


@dataclass(frozen=True)
class TraceRequestLengthGeneratorConfig(Section):
    """Lengths of a file's requests, in an order drawn by the seed."""

    trace_file: str = knob(
        "arxiv", "CSV with num_prefill_tokens,num_decode_tokens; ShareGPT .json; Mooncake .jsonl; or a shape that is "
        "shipped: arxiv, arxiv_long_online, arxiv_long_offline",
    )  # fmt: skip
    prefill_scale_factor: float = knob(1.0, "multiplies prompt lengths", low=0)
    decode_scale_factor: float = knob(1.0, "multiplies output lengths", low=0)
    max_tokens: int = knob(
        32768, "limit on prompt plus output; longer requests are cut, both in proportion", low=2, high=_TOKENS
    )
    min_tokens: int | None = knob(
        None, "drop requests with prompts of at most this many tokens; none: 8192 if max_tokens is 32768 or more, as "
        "in vAttention's benchmark, else 0, as in Sarathi-Serve's", low=0, high=_TOKENS,
    )  # fmt: skip

    @property
    def least_tokens(self) -> int:
        """The effective min_tokens."""
        if self.min_tokens is not None:
            return self.min_tokens
        return 8192 if self.max_tokens >= 32768 else 0


@dataclass(frozen=True)
class TraceRequestIntervalGeneratorConfig(Section):
    """Arrival times of a file, without its lengths."""

    trace_file: str | None = knob(None, "CSV with a column arrival_time, in seconds or as dates with times")
    start_time: str | None = knob(None, "only arrivals after this; none: from the first")
    end_time: str | None = knob(None, "only arrivals before this; none: to the last")
    time_scale_factor: float = knob(1.0, "multiplies intervals: 0.5 doubles the load", low=0)


@dataclass(frozen=True)
class PoissonRequestIntervalGeneratorConfig(Section):
    """Poisson arrivals."""

    qps: float = knob(1.0, "requests per second", low=1e-9)


@dataclass(frozen=True)
class GammaRequestIntervalGeneratorConfig(Section):
    """Gamma-distributed intervals: bursty, or more regular than Poisson."""

    qps: float = knob(0.2, "requests per second", low=1e-9)
    cv: float = knob(
        0.5, "standard deviation of intervals over their mean; 1: poisson; burstiness is 1 / cv^2", low=1e-6
    )


@dataclass(frozen=True)
class ZipfRequestLengthGeneratorConfig(Section):
    """Zipf-distributed total lengths: the n-th shortest has probability ~ 1 / n^theta."""

    theta: float = knob(0.6, "skew towards short lengths; 0: uniform", low=0)
    scramble: bool = knob(False, "spread the frequent lengths over the whole range")
    min_tokens: int = knob(1024, "shortest request, prompt and output together", low=2, high=_TOKENS)
    max_tokens: int = knob(4096, "longest request", low=2, high=_TOKENS)
    prefill_to_decode_ratio: float = knob(20.0, "prompt tokens per output token", low=1e-6)


@dataclass(frozen=True)
class UniformRequestLengthGeneratorConfig(Section):
    """Uniform total lengths."""

    min_tokens: int = knob(1024, "shortest request, prompt and output together", low=2, high=_TOKENS)
    max_tokens: int = knob(4096, "longest request", low=2, high=_TOKENS)
    prefill_to_decode_ratio: float = knob(20.0, "prompt tokens per output token", low=1e-6)


@dataclass(frozen=True)
class FixedRequestLengthGeneratorConfig(Section):
    """Equal lengths for all requests."""

    prefill_tokens: int = knob(4096, "prompt tokens", low=1, high=_TOKENS)
    decode_tokens: int = knob(512, "output tokens", low=1, high=_TOKENS)


@dataclass(frozen=True)
class PrefixRepetitionRequestLengthGeneratorConfig(Section):
    """Groups of prompts with a common prefix."""

    num_prefixes: int = knob(10, "groups", low=1, high=_REQUESTS)
    prefix_len: int = knob(256, "tokens of each group's common prefix", low=0, high=_TOKENS)
    suffix_len: int = knob(256, "prompt tokens after the prefix", low=1, high=_TOKENS)
    output_len: int = knob(128, "output tokens", low=1, high=_TOKENS)


@dataclass(frozen=True)
class MultiTurnRequestLengthGeneratorConfig(Section):
    """Conversations: each turn waits for the previous answer and sends the history. Intervals: between first turns."""

    num_turns: int = knob(6, "turns of a conversation", low=1, high=_REQUESTS)
    shared_len: int = knob(0, "tokens of a prefix common to all conversations", low=0, high=_TOKENS)
    user_len: int = knob(200, "tokens of a question", low=1, high=_TOKENS)
    output_len: int = knob(150, "tokens of an answer", low=1, high=_TOKENS)
    think_time: float = knob(0.0, "seconds between an answer and the next question", low=0)


@dataclass(frozen=True)
class ReplicaSchedulerConfig(Section):
    """Scheduling policy."""

    provider: str = knob("sarathi", "policy", choices=SCHEDULERS)
    max_batch_size: int = knob(128, "maximum number of running requests", low=1, high=2**20)


@dataclass(frozen=True)
class SarathiSchedulerConfig(Section):
    """Settings of provider sarathi."""

    chunk_size: int = knob(512, "token budget of a step", low=1, high=_TOKENS)
    enable_rolling_prefills: bool = knob(True, "several prefills may share a step; false: one per step")
    enable_dynamic_chunking_schedule: bool = knob(False, "shrink chunks as a prefill progresses")
    low_chunk_size: int = knob(128, "dynamic, learned: minimum token budget", low=1, high=_TOKENS)
    high_chunk_size: int = knob(2048, "dynamic, learned: maximum token budget", low=1, high=_TOKENS)
    chunk_schedule_max_tokens: int = knob(
        131072, "dynamic: prompt tokens at which chunks reach the minimum", low=1, high=_TOKENS
    )
    chunk_schedule_stages: int = knob(16, "dynamic: number of chunk sizes", low=1)
    target_step_time: float | None = knob(
        None, "target duration of a step in seconds: the budget is learned from step times; none: not learned", low=1e-6
    )
    max_chunk_per_request: int | None = knob(
        None, "maximum tokens of one prefill per step; none: no limit", low=1, high=_TOKENS
    )
    max_num_partial_prefills: int = knob(4, "maximum number of concurrent prefills", low=1)


@dataclass(frozen=True)
class VllmSchedulerConfig(Section):
    """Settings of providers vllm, orca and faster_transformer."""

    max_tokens_in_batch: int | None = knob(None, "token budget of a step; none: the model's limit", low=1, high=_TOKENS)


@dataclass(frozen=True)
class SimpleChunkingSchedulerConfig(Section):
    """Settings of provider simple_chunking."""

    chunk_size: int = knob(512, "token budget of a step", low=1, high=_TOKENS)


@dataclass(frozen=True)
class MetricsStoreConfig(Section):
    """Metrics to record, and upload."""

    wandb_project: str = knob("", "Weights & Biases project; empty: no upload")
    wandb_sweep_id: str = knob("", "sweep id of the run")
    wandb_run_id: str = knob("", "id of the run; empty: a new one")
    wandb_group: str = knob("", "group of runs")
    wandb_run_name: str = knob("", "name of the run; empty: a random one")
    enable_op_level_metrics: bool = knob(
        False, "time single operations of one layer on the device, without CUDA graphs"
    )
    enable_cpu_op_level_metrics: bool = knob(False, "write CPU times of the phases of a step")
    enable_request_outputs: bool = knob(False, "write the tokens of every request to responses.json")
    keep_individual_batch_metrics: bool = knob(True, "one CSV record per step and token, in addition to distributions")
    write_plots: bool = knob(True, "report.html beside the CSV files")
    memory_interval_steps: int = knob(10, "steps between samples of the cache's memory", low=1, high=_STEPS)


@dataclass(frozen=True)
class ProfilingConfig(Section):
    """Steps that torch's profiler records if enable_profiling is true."""

    start_step: int = knob(10, "steps to skip", low=0, high=_STEPS)
    num_steps: int = knob(5, "steps to profile", low=1, high=_STEPS)


@dataclass(frozen=True)
class CapacitySearchConfig(Section):
    """Search for the highest request rate that meets every latency target (SLO)."""

    scheduling_delay_slo_value: float | None = knob(
        2.0, "limit on seconds from arrival to first step; none: no target", low=1e-6
    )
    scheduling_delay_slo_quantile: float = knob(0.5, "fraction of requests that must meet it", low=0.01, high=1.0)
    tbt_slo_value: float | None = knob(0.2, "limit on seconds between tokens; none: no target", low=1e-6)
    tbt_slo_quantile: float = knob(0.99, "fraction of tokens that must meet it", low=0.01, high=1.0)
    ttft_slo_value: float | None = knob(None, "limit on seconds to the first token; none: no target", low=1e-6)
    ttft_slo_quantile: float = knob(0.99, "fraction of requests that must meet it", low=0.01, high=1.0)
    e2e_slo_value: float | None = knob(None, "limit on seconds to the last token; none: no target", low=1e-6)
    e2e_slo_quantile: float = knob(0.99, "fraction of requests that must meet it", low=0.01, high=1.0)
    completed_share: float = knob(
        0.9, "minimum ratio of completion rate to arrival rate",
        low=0.01, high=1.0,
    )  # fmt: skip
    qps_values: str | None = knob(None, "run these rates instead of a search, as 0.5,1,2; none: search")
    start_qps: float = knob(1.0, "first rate", low=1e-6)
    tolerance: float = knob(0.05, "stop when the bounds differ by this fraction", low=1e-3, high=1.0)
    max_probes: int = knob(12, "runs at most", low=1)


@dataclass(frozen=True)
class BenchmarkConfig(Section):
    """All knobs of a run."""

    seed: int = knob(42, "seed of lengths, intervals, prompts and dummy weights", low=0)
    log_level: str = knob("info", "minimum level of log messages", choices=LOG_LEVELS)
    output_dir: str = knob("./benchmark_output/", "folder of the results, created if necessary")
    timestamped_output: bool = knob(
        False, "write into a new timestamped folder in output_dir, as Sarathi-Serve's benchmark does"
    )
    write_json_trace: bool = knob(False, "write the batch of each step to schedule.jsonl")
    write_chrome_trace: bool | None = knob(
        None, "chrome_trace.json, for Perfetto; none: for runs of up to 200,000 events"
    )
    write_metrics: bool = knob(True, "record metrics; false: only the duration")
    enable_profiling: bool = knob(False, "torch profiler trace of the steps in section profiling")
    gpu_memory_utilization: float = knob(
        0.9, "fraction of GPU memory for weights, activations and cache", low=0.01, high=1.0
    )
    time_limit: float | None = knob(
        10281800.0, "time limit in seconds; the run then ends with partial results; 0 or none: no limit", low=0
    )
    num_warmup_requests: int = knob(
        1, "warm-up requests before time zero, like the first ones of the run", low=0, high=_REQUESTS
    )
    num_warmup_batch_sizes: int = knob(
        0, "additional short warm-up requests, each one token longer than the previous one: they cover every batch "
        "size up to this", low=0, high=2**16,
    )  # fmt: skip
    replica_resource_mapping: str = knob("", 'device of each replica, as JSON: {"0": "cuda:0", "1": "cuda:1"}')
    show_progress: bool = knob(True, "progress bar with tokens per second")
    cluster: ClusterConfig = ClusterConfig()
    model: BenchmarkModelConfig = BenchmarkModelConfig()
    request_generator: RequestGeneratorConfig = RequestGeneratorConfig()
    synthetic_request_generator: SyntheticRequestGeneratorConfig = SyntheticRequestGeneratorConfig()
    trace_request_generator: TraceRequestGeneratorConfig = TraceRequestGeneratorConfig()
    trace_request_length_generator: TraceRequestLengthGeneratorConfig = TraceRequestLengthGeneratorConfig()
    trace_request_interval_generator: TraceRequestIntervalGeneratorConfig = TraceRequestIntervalGeneratorConfig()
    poisson_request_interval_generator: PoissonRequestIntervalGeneratorConfig = PoissonRequestIntervalGeneratorConfig()
    gamma_request_interval_generator: GammaRequestIntervalGeneratorConfig = GammaRequestIntervalGeneratorConfig()
    zipf_request_length_generator: ZipfRequestLengthGeneratorConfig = ZipfRequestLengthGeneratorConfig()
    uniform_request_length_generator: UniformRequestLengthGeneratorConfig = UniformRequestLengthGeneratorConfig()
    fixed_request_length_generator: FixedRequestLengthGeneratorConfig = FixedRequestLengthGeneratorConfig()
    prefix_repetition_request_length_generator: PrefixRepetitionRequestLengthGeneratorConfig = (
        PrefixRepetitionRequestLengthGeneratorConfig()
    )
    multi_turn_request_length_generator: MultiTurnRequestLengthGeneratorConfig = MultiTurnRequestLengthGeneratorConfig()
    replica_scheduler: ReplicaSchedulerConfig = ReplicaSchedulerConfig()
    sarathi_scheduler: SarathiSchedulerConfig = SarathiSchedulerConfig()
    vllm_scheduler: VllmSchedulerConfig = VllmSchedulerConfig()
    simple_chunking_scheduler: SimpleChunkingSchedulerConfig = SimpleChunkingSchedulerConfig()
    metrics_store: MetricsStoreConfig = MetricsStoreConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    capacity_search: CapacitySearchConfig = CapacitySearchConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.write_json_trace and not self.write_metrics:
            raise ConfigError("write_json_trace is True: it must be false if write_metrics is False")
