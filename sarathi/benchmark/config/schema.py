"""Every knob of a benchmark run, in Sarathi-Serve's sections and by its names.

default.yml is written from this module (`python -m sarathi.benchmark.config.document`), so that nothing is said twice.
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
    """The model, and how its keys and values are kept."""

    name: str = knob("smollm2-135m", "model: a shipped name, a folder, a .gguf file, or a hub id")
    tokenizer: str | None = knob(None, "tokenizer: a folder or hub id; none: the model's own")
    tensor_parallel_degree: int = knob(1, "devices that share each layer", low=1)
    pipeline_parallel_degree: int = knob(1, "devices that take the layers in turn", low=1)
    max_model_len: int | None = knob(
        None, "longest prompt plus output, in tokens; none: the model's own limit", low=2, high=_TOKENS
    )
    load_format: str = knob(
        "dummy",
        "how weights are stored; dummy: random ones, for speed alone; auto: the model's own",
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
        False, "keep the tokens of ended requests for prompts that begin alike; off, unlike the engine's own default"
    )
    prefix_eviction: str = knob(
        CacheConfig.prefix_eviction, "which of them go first: least recently used, or least frequently",
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
    """Requests made of lengths and intervals."""

    length_provider: str = knob("trace", "where lengths come from", choices=LENGTH_PROVIDERS)
    interval_provider: str = knob(
        "static", "when requests arrive; static: all at once, at time zero", choices=INTERVAL_PROVIDERS
    )
    num_requests: int | None = knob(
        None, "how many; a longer replay is cut to them; none: 64, or a whole replay", low=1, high=_REQUESTS
    )


@dataclass(frozen=True)
class TraceRequestGeneratorConfig(Section):
    """Replay of a file with arrival times and lengths."""

    trace_file: str | None = knob(
        None, "CSV (arrived_at,num_prefill_tokens,num_decode_tokens, or Time,PromptTokenCount,CompletionTokenCount) "
        "or Mooncake JSONL",
    )  # fmt: skip
    date: str | None = knob(None, "only rows whose column Date is this; none: all")
    prefill_scale_factor: float = knob(1.0, "multiplies prompt lengths", low=0)
    decode_scale_factor: float = knob(1.0, "multiplies output lengths", low=0)
    time_scale_factor: float = knob(1.0, "multiplies arrival times: 0.5 doubles the load", low=0)
    max_tokens: int = knob(32768, "a longer request loses prompt tokens until it fits", low=2, high=_TOKENS)


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
        32768, "a longer request is cut to fit, prompt and output in proportion", low=2, high=_TOKENS
    )
    min_tokens: int | None = knob(
        None, "requests with prompts of no more tokens are left out; none: 8192 where max_tokens is 32768 or more, as "
        "in vAttention's benchmark, else 0, as in Sarathi-Serve's", low=0, high=_TOKENS,
    )  # fmt: skip

    @property
    def least_tokens(self) -> int:
        """min_tokens as a number."""
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
    """Arrivals that know nothing of each other."""

    qps: float = knob(1.0, "requests a second", low=1e-9)


@dataclass(frozen=True)
class GammaRequestIntervalGeneratorConfig(Section):
    """Arrivals in bursts, or more even than chance."""

    qps: float = knob(0.2, "requests a second", low=1e-9)
    cv: float = knob(
        0.5, "standard deviation of intervals over their mean; 1: poisson; burstiness is 1 / cv^2", low=1e-6
    )


@dataclass(frozen=True)
class ZipfRequestLengthGeneratorConfig(Section):
    """Total lengths of which the n-th shortest has probability ~ 1 / n^theta."""

    theta: float = knob(0.6, "how much shorter lengths are preferred; 0: not at all", low=0)
    scramble: bool = knob(False, "spread the frequent lengths over the whole range")
    min_tokens: int = knob(1024, "shortest request, prompt and output together", low=2, high=_TOKENS)
    max_tokens: int = knob(4096, "longest request", low=2, high=_TOKENS)
    prefill_to_decode_ratio: float = knob(20.0, "prompt tokens an output token", low=1e-6)


@dataclass(frozen=True)
class UniformRequestLengthGeneratorConfig(Section):
    """Total lengths, all equally likely."""

    min_tokens: int = knob(1024, "shortest request, prompt and output together", low=2, high=_TOKENS)
    max_tokens: int = knob(4096, "longest request", low=2, high=_TOKENS)
    prefill_to_decode_ratio: float = knob(20.0, "prompt tokens an output token", low=1e-6)


@dataclass(frozen=True)
class FixedRequestLengthGeneratorConfig(Section):
    """All requests alike."""

    prefill_tokens: int = knob(4096, "prompt tokens", low=1, high=_TOKENS)
    decode_tokens: int = knob(512, "output tokens", low=1, high=_TOKENS)


@dataclass(frozen=True)
class PrefixRepetitionRequestLengthGeneratorConfig(Section):
    """Groups of prompts that begin alike."""

    num_prefixes: int = knob(10, "groups", low=1, high=_REQUESTS)
    prefix_len: int = knob(256, "prompt tokens that a group shares", low=0, high=_TOKENS)
    suffix_len: int = knob(256, "prompt tokens behind them", low=1, high=_TOKENS)
    output_len: int = knob(128, "output tokens", low=1, high=_TOKENS)


@dataclass(frozen=True)
class MultiTurnRequestLengthGeneratorConfig(Section):
    """Conversations: each turn sends all before it, once its answer is complete. Intervals are those of first turns."""

    num_turns: int = knob(6, "questions of a conversation", low=1, high=_REQUESTS)
    shared_len: int = knob(0, "prompt tokens that all conversations begin with", low=0, high=_TOKENS)
    user_len: int = knob(200, "tokens of a question", low=1, high=_TOKENS)
    output_len: int = knob(150, "tokens of an answer", low=1, high=_TOKENS)
    think_time: float = knob(0.0, "seconds between an answer and the next question", low=0)


@dataclass(frozen=True)
class ReplicaSchedulerConfig(Section):
    """Who goes first."""

    provider: str = knob("sarathi", "policy", choices=SCHEDULERS)
    max_batch_size: int = knob(128, "requests that run at the same time, at most", low=1, high=2**20)


@dataclass(frozen=True)
class SarathiSchedulerConfig(Section):
    """Where provider is sarathi."""

    chunk_size: int = knob(512, "token budget of a step", low=1, high=_TOKENS)
    enable_rolling_prefills: bool = knob(True, "several prompts may share a step; false: one a step")
    enable_dynamic_chunking_schedule: bool = knob(False, "large chunks first, smaller ones as a prompt grows")
    low_chunk_size: int = knob(128, "dynamic, learned: fewest tokens of a step", low=1, high=_TOKENS)
    high_chunk_size: int = knob(2048, "dynamic, learned: most tokens of a step", low=1, high=_TOKENS)
    chunk_schedule_max_tokens: int = knob(
        131072, "dynamic: prompt tokens after which chunks are smallest", low=1, high=_TOKENS
    )
    chunk_schedule_stages: int = knob(16, "dynamic: sizes between the largest and the smallest chunk", low=1)
    target_step_time: float | None = knob(
        None, "seconds a step may take: the budget is learned from the times of steps; none: not learned", low=1e-6
    )
    max_chunk_per_request: int | None = knob(
        None, "tokens one prompt may take of a step; none: all of them", low=1, high=_TOKENS
    )
    max_num_partial_prefills: int = knob(4, "prompts in progress at the same time, at most", low=1)


@dataclass(frozen=True)
class VllmSchedulerConfig(Section):
    """Where provider is vllm; orca and faster_transformer take it as well."""

    max_tokens_in_batch: int | None = knob(None, "tokens of a step; none: the model's limit", low=1, high=_TOKENS)


@dataclass(frozen=True)
class SimpleChunkingSchedulerConfig(Section):
    """Where provider is simple_chunking."""

    chunk_size: int = knob(512, "token budget of a step", low=1, high=_TOKENS)


@dataclass(frozen=True)
class MetricsStoreConfig(Section):
    """What is kept of a run and where it goes."""

    wandb_project: str = knob("", "Weights & Biases project; empty: nothing is sent")
    wandb_sweep_id: str = knob("", "sweep that the run is marked with")
    wandb_run_id: str = knob("", "id of the run; empty: a new one")
    wandb_group: str = knob("", "group of runs")
    wandb_run_name: str = knob("", "name of the run; empty: a random one")
    enable_op_level_metrics: bool = knob(
        False, "time single operations of one layer on the device, without CUDA graphs"
    )
    enable_cpu_op_level_metrics: bool = knob(False, "write the times of a step's parts on the processor")
    enable_request_outputs: bool = knob(False, "write the tokens of every request to responses.json")
    keep_individual_batch_metrics: bool = knob(True, "one CSV row for every step and token, beside distributions")
    write_plots: bool = knob(True, "report.html beside the CSV files")
    memory_interval_steps: int = knob(10, "steps between two looks at the cache's memory", low=1, high=_STEPS)


@dataclass(frozen=True)
class ProfilingConfig(Section):
    """Which steps torch's profiler sees, where enable_profiling is true."""

    start_step: int = knob(10, "steps before the first one that is seen", low=0, high=_STEPS)
    num_steps: int = knob(5, "steps that are seen", low=1, high=_STEPS)


@dataclass(frozen=True)
class CapacitySearchConfig(Section):
    """Where the highest rate of requests that meets every latency target (SLO) is looked for."""

    scheduling_delay_slo_value: float | None = knob(
        2.0, "seconds from a request's arrival to its first step, at most; none: not a target", low=1e-6
    )
    scheduling_delay_slo_quantile: float = knob(0.5, "share of requests that must meet it", low=0.01, high=1.0)
    tbt_slo_value: float | None = knob(0.2, "seconds between tokens, at most; none: not a target", low=1e-6)
    tbt_slo_quantile: float = knob(0.99, "share of tokens that must meet it", low=0.01, high=1.0)
    ttft_slo_value: float | None = knob(None, "seconds to the first token, at most; none: not a target", low=1e-6)
    ttft_slo_quantile: float = knob(0.99, "share of requests that must meet it", low=0.01, high=1.0)
    e2e_slo_value: float | None = knob(None, "seconds to the last token, at most; none: not a target", low=1e-6)
    e2e_slo_quantile: float = knob(0.99, "share of requests that must meet it", low=0.01, high=1.0)
    completed_share: float = knob(
        0.9, "requests completed a second, over those that arrived a second, at least: whether the engine keeps up",
        low=0.01, high=1.0,
    )  # fmt: skip
    qps_values: str | None = knob(None, "rates that are run in place of a search, as 0.5,1,2; none: a search")
    start_qps: float = knob(1.0, "first rate that is tried", low=1e-6)
    tolerance: float = knob(0.05, "the search ends when the bounds differ by this share", low=1e-3, high=1.0)
    max_probes: int = knob(12, "runs at most", low=1)


@dataclass(frozen=True)
class BenchmarkConfig(Section):
    """Everything of one run."""

    seed: int = knob(42, "of lengths, intervals, prompts and dummy weights; the same seed gives the same run", low=0)
    log_level: str = knob("info", "how much is said", choices=LOG_LEVELS)
    output_dir: str = knob("./benchmark_output/", "folder of the results; made if need be")
    timestamped_output: bool = knob(
        False, "write into a folder of its own in output_dir, named by date and time, as Sarathi-Serve's benchmark does"
    )
    write_json_trace: bool = knob(False, "what each step was made of, to schedule.jsonl")
    write_chrome_trace: bool | None = knob(
        None, "chrome_trace.json, for Perfetto; none: for runs of up to 200,000 events"
    )
    write_metrics: bool = knob(True, "record at all; false: only the duration is known")
    enable_profiling: bool = knob(False, "a trace by torch's profiler of the steps in section profiling")
    gpu_memory_utilization: float = knob(
        0.9, "share of the GPU's memory for weights, activations and cache together", low=0.01, high=1.0
    )
    time_limit: float | None = knob(
        10281800.0, "seconds after which the run ends with what it has; 0 or none: no limit", low=0
    )
    num_warmup_requests: int = knob(
        1, "requests served before time zero, like the first ones of the run", low=0, high=_REQUESTS
    )
    num_warmup_batch_sizes: int = knob(
        0, "short requests served beside the warm-up requests, each a token longer than the one before: kernels meet "
        "every batch size up to this", low=0, high=2**16,
    )  # fmt: skip
    replica_resource_mapping: str = knob("", 'device of each replica, as JSON: {"0": "cuda:0", "1": "cuda:1"}')
    show_progress: bool = knob(True, "a bar with the tokens a second")
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
            raise ConfigError("write_json_trace is True: it must be false where write_metrics is False")
