"""Command lines of the artifacts of vAttention (ASPLOS 2025) and Sarathi-Serve (OSDI 2024), by figure and table.

Names and values are those of their scripts. TRACE stands for the file of lengths. Figures 2 and 3 of vAttention call
kernels alone, and its artifact has no scripts of tables.
"""

from collections.abc import Iterator
from itertools import product

TRACE = "TRACE"
Settings = dict[str, object]

_ASPLOS_MODELS = {
    "yi-6b": ("01-ai/Yi-6B-200k", 1), "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", 2),
    "yi-34b": ("01-ai/Yi-34B-200k", 2),
}  # fmt: skip
_PAGE_BYTES = {"fa_paged": 256, "fi_paged": 16}  # of other backends, 2 MiB


def _asplos(model: str, backend: str, **settings: object) -> Settings:
    name, degree = _ASPLOS_MODELS[model]
    return {
        "model_name": name, "model_tensor_parallel_degree": degree, "request_generator_provider": "synthetic",
        **settings,
        "metrics_store_enable_op_level_metrics": "false", "metrics_store_keep_individual_batch_metrics": "true",
        "output_dir": "./logs/", "model_block_size": _PAGE_BYTES.get(backend, 2097152),
        "model_attention_backend": backend, "gpu_memory_utilization": 0.9,
    }  # fmt: skip


def _static(model: str, backend: str, tokens: int, ratio: int, batch: int, count: int, **settings: object) -> Settings:
    """Equal requests that all arrive at once."""
    defaults = {"replica_scheduler_provider": "vllm", "vllm_scheduler_max_tokens_in_batch": tokens} | settings
    return _asplos(
        model, backend, synthetic_request_generator_length_provider="uniform",
        synthetic_request_generator_interval_provider="static", uniform_request_length_generator_max_tokens=tokens,
        uniform_request_length_generator_min_tokens=tokens,
        uniform_request_length_generator_prefill_to_decode_ratio=ratio,
        trace_request_length_generator_prefill_scale_factor=1, trace_request_length_generator_decode_scale_factor=1,
        replica_scheduler_max_batch_size=batch, model_max_model_len=tokens,
        synthetic_request_generator_num_requests=count, trace_request_generator_max_tokens=tokens, **defaults,
    )  # fmt: skip


def _long_trace(model: str, backend: str, low: int, high: int, count: int, **settings: object) -> Settings:
    """Lengths of a trace; no provider of lengths is named."""
    return _asplos(
        model, backend, synthetic_request_generator_num_requests=count, trace_request_length_generator_min_tokens=low,
        trace_request_length_generator_max_tokens=high, trace_request_length_generator_prefill_scale_factor=1,
        trace_request_length_generator_trace_file=TRACE, **settings,
    )  # fmt: skip


def _figure_4() -> Iterator[Settings]:
    for model, batch in product(_ASPLOS_MODELS, (1, 64, 128, 192, 256, 300)):
        yield _static(model, "fa_paged", 900, 25, batch, 2 * batch)


def _figure_6() -> Iterator[Settings]:
    lengths = (2048, 4096, 8192, 16384, 32768, 65536, 131072, 196608)
    for model, tokens, backend in product(_ASPLOS_MODELS, lengths, ("fa_paged", "fi_paged", "fa_vattn", "fi_vattn")):
        ratio, count = (1000, 2) if tokens > 16384 else (500, 10)
        chunked = {"replica_scheduler_provider": "sarathi", "vllm_scheduler_max_tokens_in_batch": 16384}
        yield _static(model, backend, tokens, ratio, 1, count, **(chunked if model == "yi-34b" else {}))


def _figure_7() -> Iterator[Settings]:
    batches = (1, 2, 4, 8, 12, 16, 32)
    for model, backend, batch in product(_ASPLOS_MODELS, ("fa_paged", "fi_paged", "fa_vattn"), batches):
        yield _static(model, backend, 16384, 500, batch, 2 * batch)


def _figure_8() -> Iterator[Settings]:
    for model, backend in product(_ASPLOS_MODELS, ("fa_paged", "fi_paged", "fa_vattn")):
        yield _long_trace(
            model, backend, 65536, 196608, 100, synthetic_request_generator_interval_provider="static",
            replica_scheduler_provider="sarathi", sarathi_scheduler_chunk_size=16384,
            vllm_scheduler_max_tokens_in_batch=196608, model_max_model_len=262144,
        )  # fmt: skip


def _figure_9() -> Iterator[Settings]:
    for model, backend, count in product(_ASPLOS_MODELS, ("fa_paged", "fi_paged", "fa_vattn"), (100, 512)):
        yield _long_trace(
            model, backend, 16384, 65536, count, synthetic_request_generator_interval_provider="poisson",
            poisson_request_interval_generator_qps=0.2, replica_scheduler_provider="vllm",
            vllm_scheduler_max_tokens_in_batch=65536, model_max_model_len=65536,
        )  # fmt: skip


def _figure_11() -> Iterator[Settings]:
    for backend in ("fa_vattn", "fa_vattn_sync"):
        yield _long_trace(
            "llama-3-8b", backend, 128, 32768, 300, synthetic_request_generator_interval_provider="static",
            replica_scheduler_provider="vllm", vllm_scheduler_max_tokens_in_batch=32768,
            replica_scheduler_max_batch_size=64, model_max_model_len=32768,
        )  # fmt: skip


_E2E_BACKENDS = {
    "fa_paged": 256, "fi_paged": 16, "fa_vattn": 2097152, "fi_vattn": 262144, "fa_vattn_sync": 262144,
}  # fmt: skip


def _static_traces() -> Iterator[Settings]:
    """scripts/benchmark_e2e_static_trace.py"""
    for (backend, size), tokens, ratio in product(_E2E_BACKENDS.items(), (32768, 65536, 131072), (500, 100, 50)):
        yield _static("yi-6b", backend, tokens, ratio, 16, 50) | {"model_block_size": size}


def _dynamic_traces() -> Iterator[Settings]:
    """scripts/benchmark_e2e_dynamic_trace.py"""
    for (backend, size), qps in product(_E2E_BACKENDS.items(), (0.4, 0.8, 1, 2, 4, 6)):
        line = _long_trace(
            "yi-6b", backend, 0, 32768, 256, synthetic_request_generator_length_provider="trace",
            synthetic_request_generator_interval_provider="poisson", poisson_request_interval_generator_qps=qps,
            replica_scheduler_provider="vllm", trace_request_length_generator_decode_scale_factor=1,
            replica_scheduler_max_batch_size=256, vllm_scheduler_max_tokens_in_batch=32768, model_max_model_len=32768,
        )  # fmt: skip
        yield line | {"model_block_size": size, "metrics_store_keep_individual_batch_metrics": "false"}


def _osdi(
    max_model_len: int, count: int, batch: int, degrees: tuple[int, int] = (2, 1), **settings: object
) -> Settings:
    return {
        "output_dir": "./benchmark_output", "model_name": "01-ai/Yi-34B-200K", "model_max_model_len": max_model_len,
        "model_tensor_parallel_degree": degrees[0], "model_pipeline_parallel_degree": degrees[1],
        "request_generator_provider": "synthetic", "synthetic_request_generator_num_requests": count,
        "replica_scheduler_max_batch_size": batch, **settings,
    }  # fmt: skip


def _osdi_trace(tokens: int, count: int, batch: int, **settings: object) -> Settings:
    return _osdi(
        tokens, count, batch, **{"synthetic_request_generator_length_provider": "trace",
        "trace_request_length_generator_trace_file": TRACE, "trace_request_length_generator_max_tokens": tokens,
        "trace_request_length_generator_prefill_scale_factor": 1,
        "trace_request_length_generator_decode_scale_factor": 1}, **settings,
    )  # fmt: skip


def _vllm(tokens: int) -> Settings:
    return {"replica_scheduler_provider": "vllm", "vllm_scheduler_max_tokens_in_batch": tokens}


def _sarathi(chunk: int, rolling: str = "true") -> Settings:
    return {
        "replica_scheduler_provider": "sarathi", "sarathi_scheduler_chunk_size": chunk,
        "sarathi_scheduler_enable_rolling_prefills": rolling,
    }  # fmt: skip


_POISSON, _STATIC = (
    {"cluster_num_replicas": 1, "synthetic_request_generator_interval_provider": name} for name in ("poisson", "static")
)
_FIXED_CHUNKS = {"sarathi_scheduler_enable_dynamic_chunking_schedule": "false"}
_QUIET = {
    "time_limit": 1800, "metrics_store_enable_op_level_metrics": "false",
    "metrics_store_enable_request_outputs": "false", "metrics_store_keep_individual_batch_metrics": "false",
    "write_chrome_trace": "false",
}  # fmt: skip
_WANDB = {
    "metrics_store_wandb_project": "llm-simulator", "metrics_store_wandb_group": "g",
    "metrics_store_wandb_run_name": "n",
}  # fmt: skip


def _figure_1() -> Iterator[Settings]:
    for policy in (_vllm(16384), _sarathi(1536) | _FIXED_CHUNKS):
        yield _osdi_trace(16384, 128, 256, **_STATIC, **_WANDB, **policy)
    for qps, policy in product((0.55, 0.7, 1.0), (_vllm(8192), _sarathi(1536) | _FIXED_CHUNKS)):
        yield _osdi_trace(8192, 128, 256, **_POISSON, poisson_request_interval_generator_qps=qps, **policy)


def _figure_2() -> Iterator[Settings]:
    for timed in ("false", "true"):
        timing = {"metrics_store_enable_op_level_metrics": timed}
        yield _osdi_trace(16385, 8, 1, **_STATIC, **_WANDB, **_vllm(16385), **timing)
        for batch in (1, 2, 4, 8, 16, 32, 64, 128):
            yield _osdi(1024, 2 * batch, batch, **_STATIC, **_WANDB, **_uniform(1024, 255.0), **_vllm(1024), **timing)


def _uniform(tokens: int, ratio: float) -> Settings:
    """The script first gives a provider that does not exist, and then another."""
    return {
        "synthetic_request_generator_length_provider": "uniform",
        "uniform_request_length_generator_prefill_to_decode_ratio": ratio,
        "uniform_request_length_generator_min_tokens": tokens, "uniform_request_length_generator_max_tokens": tokens,
    }  # fmt: skip


def _osdi_figure_8() -> Iterator[Settings]:
    for batch, degrees in product((8, 16, 32, 64, 128), ((8, 1), (4, 2))):
        line = _osdi_trace(8192, 2048, batch, degrees=degrees, poisson_request_interval_generator_qps=0.75)
        yield line | _POISSON | _sarathi(512) | _QUIET | {"model_name": "tiiuae/falcon-180B"}


def _osdi_figure_9() -> Iterator[Settings]:
    for tokens, chunk in product((2048, 4096, 8192, 16384), (512, 1024, 2048, 16384)):
        yield _osdi(16384, 5, 1) | _STATIC | _uniform(tokens, tokens - 1) | _sarathi(chunk, "false") | _FIXED_CHUNKS


def _table_2() -> Iterator[Settings]:
    fixed = {
        "synthetic_request_generator_length_provider": "fixed", "fixed_request_length_generator_prefill_tokens": 1024,
        "fixed_request_length_generator_decode_tokens": 16,
    }  # fmt: skip
    for policy, timed in product((_vllm(1040), _sarathi(1024) | _FIXED_CHUNKS), ("false", "true")):
        yield _osdi(1040, 8, 4) | _STATIC | fixed | policy | {"metrics_store_enable_op_level_metrics": timed}


def _table_6() -> Iterator[Settings]:
    for chunk, provider in ((0, "sarathi"), (512, "sarathi"), (512, "simple_chunking")):
        for tokens, qps in ((8192, 1), (16384, 0.5)):
            policy = _sarathi(chunk or tokens) | {"replica_scheduler_provider": provider}
            line = _osdi_trace(tokens, 128, 128, poisson_request_interval_generator_qps=qps)
            yield line | _POISSON | policy | _QUIET


LINES = {
    "asplos figure 4": list(_figure_4()), "asplos figure 6": list(_figure_6()), "asplos figure 7": list(_figure_7()),
    "asplos figure 8": list(_figure_8()), "asplos figure 9": list(_figure_9()),
    "asplos figure 11": list(_figure_11()), "static traces": list(_static_traces()),
    "dynamic traces": list(_dynamic_traces()), "osdi figure 1": list(_figure_1()), "osdi figure 2": list(_figure_2()),
    "osdi figure 8": list(_osdi_figure_8()), "osdi figure 9": list(_osdi_figure_9()), "osdi table 2": list(_table_2()),
    "osdi table 6": list(_table_6()),
}  # fmt: skip
"""Figure or table -> its command lines, option -> value."""
