"""Command lines and files of vAttention's and Sarathi-Serve's artifacts: each is taken, and gives their lengths.

Traces are made here, with the same columns.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from original_commands import LINES, TRACE, Settings
from small_models import save_tiny_config

from sarathi.benchmark.config.engine import engine_config, sized_backend
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.main import main
from sarathi.benchmark.workload import generate_requests
from sarathi.config.knobs import ConfigError
from sarathi.config.schema import SchedulerConfig
from sarathi.core.scheduler.prefill_policy import ChunkedPrefill
from sarathi.core.scheduler.request_state import Step
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

SEED = 0  # set anew for each test: see tests/conftest.py
ROWS = 400  # of the made trace
SHARED_DEFAULTS = """
seed: 42
log_level: info
output_dir: ./benchmark_output/
write_json_trace: true
write_chrome_trace: true
write_metrics: true
enable_profiling: false
replica_resource_mapping: ""
cluster: {num_replicas: 1}
request_generator: {provider: synthetic}
poisson_request_interval_generator: {qps: 1.0}
gamma_request_interval_generator: {cv: 0.5, qps: 0.2}
zipf_request_length_generator: {theta: 0.6, scramble: false, min_tokens: 1024, max_tokens: 4096,
                                prefill_to_decode_ratio: 20.0}
uniform_request_length_generator: {min_tokens: 1024, max_tokens: 4096, prefill_to_decode_ratio: 20.0}
fixed_request_length_generator: {prefill_tokens: 4096, decode_tokens: 512}
trace_request_interval_generator: {trace_file: ./data/azure.csv, start_time: "1970-01-04 12:00:00",
                                   end_time: "1970-01-04 15:00:00", time_scale_factor: 0.3}
replica_scheduler: {provider: sarathi, max_batch_size: 128}
sarathi_scheduler: {chunk_size: 512, enable_dynamic_chunking_schedule: false, low_chunk_size: 128,
                    high_chunk_size: 2048, chunk_schedule_max_tokens: 131072, chunk_schedule_stages: 16}
vllm_scheduler: {max_tokens_in_batch: null}
simple_chunking_scheduler: {chunk_size: 512}
metrics_store: {wandb_project: "", wandb_sweep_id: "", wandb_run_id: "", wandb_group: "", wandb_run_name: "",
                enable_op_level_metrics: false, enable_cpu_op_level_metrics: false, enable_request_outputs: false,
                keep_individual_batch_metrics: false}
"""
VATTENTION_DEFAULTS = f"""{SHARED_DEFAULTS}
gpu_memory_utilization: 0.85
time_limit: 0
model: {{name: meta-llama/Meta-Llama-3-8B, tensor_parallel_degree: 2, pipeline_parallel_degree: 1, max_model_len: 4096,
        load_format: dummy, attention_backend: vattn_fa, block_size: 128}}
synthetic_request_generator: {{length_provider: trace, interval_provider: static, num_requests: 64}}
trace_request_generator: {{trace_file: ./data/sydney.csv, date: '2023-08-21', prefill_scale_factor: 0.3,
                          decode_scale_factor: 1, time_scale_factor: 0.04, max_tokens: 32768}}
trace_request_length_generator: {{trace_file: ./data/sharegpt.csv, prefill_scale_factor: 1, decode_scale_factor: 1,
                                 max_tokens: 32768, min_tokens: 8192}}
"""
SARATHI_SERVE_DEFAULTS = f"""{SHARED_DEFAULTS}
gpu_memory_utilization: 0.9
time_limit: 1800
model: {{name: meta-llama/Meta-Llama-3-8B, tensor_parallel_degree: 4, pipeline_parallel_degree: 1, max_model_len: 4096,
        load_format: dummy, attention_backend: flash_attention}}
synthetic_request_generator: {{length_provider: trace, interval_provider: poisson, num_requests: 64}}
trace_request_generator: {{trace_file: ./data/sydney.csv, date: '2023-08-21', prefill_scale_factor: 0.3,
                          decode_scale_factor: 1, time_scale_factor: 0.04, max_tokens: 4096}}
trace_request_length_generator: {{trace_file: ./data/sharegpt.csv, prefill_scale_factor: 1, decode_scale_factor: 1,
                                 max_tokens: 4096}}
"""


def made_trace(folder: Path, high: int) -> pd.DataFrame:
    """trace.csv with lengths of which some are cut to `high` tokens, and prompts on both sides of 16K and 64K."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    prompts = np.exp(rng.uniform(0, np.log(1.2 * high), ROWS)).astype(int)
    lengths = {"num_prefill_tokens": prompts, "num_decode_tokens": rng.integers(1, 1 + high // 8, ROWS)}
    frame = pd.DataFrame(lengths)
    frame.to_csv(folder / "trace.csv", index=False)
    return frame


def words_of(line: Settings, trace: Path) -> list[str]:
    return [word for name, value in line.items() for word in (f"--{name}", str(trace if value == TRACE else value))]


def lengths_of(line: Settings, frame: pd.DataFrame) -> list[list[int]]:
    """What the original draws: equal lengths by its formula, or the rows of a frame, cut, filtered and sampled."""
    count = int(str(line["synthetic_request_generator_num_requests"]))
    provider = line.get("synthetic_request_generator_length_provider", "trace")
    if provider == "fixed":
        return [[1024, 16]] * count
    if provider == "uniform":
        total = int(str(line["uniform_request_length_generator_max_tokens"]))
        ratio = float(str(line["uniform_request_length_generator_prefill_to_decode_ratio"]))
        output = math.ceil(total / (1 + ratio))
        return [[total - output, output]] * count
    limit, low = (line.get(f"trace_request_length_generator_{name}_tokens", 0) for name in ("max", "min"))
    total = frame.sum(axis=1)
    excess = (total - limit).clip(lower=0)
    cut = (frame - np.ceil(frame.div(total, axis=0).mul(excess, axis=0)).astype(int)).clip(lower=1)
    rows: list[list[int]] = cut[cut.num_prefill_tokens > low].sample(frac=1, random_state=42).values.tolist()
    return [rows[number % len(rows)] for number in range(count)]


@pytest.mark.parametrize("name", LINES)
def test_every_command_line_is_taken_and_gives_the_originals_lengths(name: str, tmp_path: Path) -> None:
    high = max(int(str(line.get("trace_request_length_generator_max_tokens", 1))) for line in LINES[name])
    frame = made_trace(tmp_path, max(high, 1000))
    for line in LINES[name]:
        config = parse_options(words_of(line, tmp_path / "trace.csv"))
        found = [[spec.num_prefill_tokens, spec.num_decode_tokens] for spec in generate_requests(config)]
        assert found == lengths_of(line, frame), line
        engine = engine_config(config)
        assert engine.model.model == line["model_name"]
        assert engine.parallel.tensor_parallel_size == line["model_tensor_parallel_degree"]
        assert engine.scheduler.max_num_seqs == line.get("replica_scheduler_max_batch_size", 128)


SMALL = {  # sizes alone, of a run on a CPU
    "model_tensor_parallel_degree": 1, "model_pipeline_parallel_degree": 1, "model_max_model_len": 128,
    "model_device": "cpu", "model_kv_cache_bytes": "8mb", "show_progress": "f", "metrics_store_write_plots": "f",
    "synthetic_request_generator_num_requests": 7,
}  # fmt: skip
SMALL_TRACE = {"trace_request_length_generator_max_tokens": 128, "trace_request_length_generator_min_tokens": 16}
SMALL_UNIFORM = {
    "uniform_request_length_generator_min_tokens": 60, "uniform_request_length_generator_max_tokens": 60,
}  # fmt: skip
RUNS: list[tuple[str, int, Settings]] = [
    ("asplos figure 4", 1, SMALL_UNIFORM | {"model_attention_backend": "sdpa_paged", "model_block_size": 16}),
    ("asplos figure 8", 2, SMALL_TRACE | {"model_attention_backend": "sdpa_vattn", "sarathi_scheduler_chunk_size": 64}),
    ("asplos figure 9", 2, SMALL_TRACE | {"poisson_request_interval_generator_qps": 200}),
    ("asplos figure 11", 1, SMALL_TRACE | {"model_attention_backend": "sdpa_vattn_sync"}),
    ("osdi figure 2", 10, SMALL_UNIFORM | {"metrics_store_wandb_project": ""}),
    ("osdi table 6", 5, SMALL_TRACE | {"poisson_request_interval_generator_qps": 200}),
]


@pytest.mark.parametrize(("name", "number", "sizes"), RUNS, ids=[each[0] for each in RUNS])
def test_a_run_of_each_kind_has_the_originals_lengths_and_files(
    name: str, number: int, sizes: Settings, tmp_path: Path
) -> None:
    """With another model, backend and sizes alone."""
    frame = made_trace(tmp_path, 128)
    small = {"output_dir": tmp_path / "out", "model_name": save_tiny_config(tmp_path / "model"), **SMALL, **sizes}
    line = LINES[name][number]
    if "paged" in str(line.get("model_attention_backend")) and "model_attention_backend" not in sizes:
        small |= {"model_attention_backend": "sdpa_paged", "model_block_size": 16}
    if "vllm_scheduler_max_tokens_in_batch" in line:
        small["vllm_scheduler_max_tokens_in_batch"] = 128
    assert main(words_of(line | small, tmp_path / "trace.csv")) == 0
    tables = tmp_path / "out" / "replica_0"
    columns = ["request_num_prefill_tokens", "request_num_decode_tokens"]
    found = pd.read_csv(tables / "sequence_metrics.csv")[columns].astype(int).values.tolist()
    assert sorted(found) == sorted(lengths_of(line | small, frame))
    keeps_steps = line.get("metrics_store_keep_individual_batch_metrics", "true") == "true"
    assert (tables / "batch_metrics.csv").exists() == keeps_steps
    if line["metrics_store_enable_op_level_metrics"] == "true":
        assert (pd.read_csv(tables / "operation_metrics.csv")["mlp_up_proj"] > 0).all()
    for metric in ("prefill_time_execution_plus_preemption", "decode_completion_time_series"):
        assert len(pd.read_csv(tables / "plots" / f"{metric}.csv"))


def test_the_originals_pages_and_blocks_are_sizes_of_the_backend() -> None:
    sizes = {
        (line["model_attention_backend"], line["model_block_size"])
        for name in LINES if not name.startswith("osdi") for line in LINES[name]
    }  # fmt: skip
    names = {f"{backend} {size}": sized_backend(str(backend), str(size)) for backend, size in sizes}
    assert names == {
        "fa_paged 256": "fa_paged_256", "fi_paged 16": "fi_paged_16", "fa_vattn 2097152": "fa_vattn_2mb",
        "fi_vattn 2097152": "fi_vattn_2mb", "fa_vattn_sync 2097152": "fa_vattn_sync_2mb",
        "fi_vattn 262144": "fi_vattn_256kb", "fa_vattn_sync 262144": "fa_vattn_sync_256kb",
    }  # fmt: skip


def test_what_a_command_line_sets_in_vain_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    parse_options(words_of(LINES["asplos figure 7"][0], tmp_path))
    told = "trace_request_length_generator.decode_scale_factor has no effect: "
    told += "synthetic_request_generator.length_provider is uniform, and only trace reads it"
    assert told in caplog.text
    assert "vllm_scheduler" not in caplog.text
    parse_options(words_of(LINES["asplos figure 8"][0], tmp_path))
    assert "vllm_scheduler.max_tokens_in_batch has no effect: replica_scheduler.provider is sarathi" in caplog.text


@pytest.mark.parametrize(("line", "rolling"), [(LINES["osdi table 6"][0], True), (LINES["osdi figure 9"][0], False)])
def test_rolling_prefills_reach_the_scheduler(line: Settings, rolling: bool, tmp_path: Path) -> None:
    assert engine_config(parse_options(words_of(line, tmp_path))).scheduler.rolling_prefills is rolling


def test_vattentions_default_file_is_a_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "default.yml"
    path.write_text(VATTENTION_DEFAULTS)
    config = parse_options(["--config", str(path), "--model_attention_backend", "sdpa_vattn"])
    assert (config.time_limit, config.synthetic_request_generator.num_requests) == (0, 64)
    assert config.trace_request_length_generator.least_tokens == 8192
    assert str(engine_config(config).model.attention_backend) == "sdpa_vattn"
    assert "model.block_size 128 has no effect" in caplog.text
    assert parse_options(["--config", str(path)]).model.attention_backend == "fa_vattn"


def test_sarathi_serves_default_file_is_a_config(tmp_path: Path) -> None:
    path = tmp_path / "default.yml"
    path.write_text(SARATHI_SERVE_DEFAULTS)
    config = parse_options(["--config", str(path)])
    assert (config.time_limit, config.synthetic_request_generator.interval_provider) == (1800, "poisson")
    assert config.trace_request_length_generator.least_tokens == 0
    assert str(engine_config(config).model.attention_backend) == "fa_paged"


def test_defaults_are_the_originals() -> None:
    config = parse_options([])
    assert config.synthetic_request_generator.length_provider == "trace"
    assert (config.model.load_format, config.time_limit) == ("dummy", 10281800.0)
    assert config.trace_request_length_generator.least_tokens == 8192
    assert (config.replica_scheduler.provider, config.replica_scheduler.max_batch_size) == ("sarathi", 128)


@pytest.mark.parametrize("name", ["fa_pod", "fa_streams", "fi_unpaged", "FI_UNPAGED"])
def test_backends_of_the_original_alone_say_what_to_use(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not supported: it is .*; f[ai]_vattn"):
        parse_options(["--model_attention_backend", name])


def test_sarathi_serves_backend_is_paged_flash_attention() -> None:
    assert parse_options(["--attention_backend=flash_attention"]).model.attention_backend == "fa_paged"


def test_the_last_of_two_values_counts() -> None:
    """Scripts of OSDI's figures 2 and 9 give a provider that does not exist, and then one that does."""
    name = "--synthetic_request_generator_length_provider"
    assert parse_options([name, "synthetic", name, "fixed"]).synthetic_request_generator.length_provider == "fixed"


@pytest.mark.parametrize(("word", "value"), [("t", True), ("1", True), ("F", False), ("0", False)])
def test_truth_values_in_one_letter(word: str, value: bool) -> None:
    assert parse_options(["--write_json_trace", word]).write_json_trace is value
    with pytest.raises(ConfigError, match="true or false"):
        parse_options(["--write_json_trace", "2"])


def test_small_block_sizes_count_tokens_beside_pages() -> None:
    assert sized_backend("fa_vattn", "128") == "fa_vattn"
    assert sized_backend("fa_paged", "128") == "fa_paged_128"


@pytest.mark.parametrize("rolling", [True, False])
def test_without_rolling_prefills_a_step_has_one_prompt(rolling: bool) -> None:
    policy = ChunkedPrefill(SchedulerConfig(rolling_prefills=rolling), 64)
    step = Step(0)
    step.num_tokens = step.num_prompt_tokens = 20
    request = Request("a", [1] * 30, SamplingParams(), frozenset())
    assert policy.chunk_length(request, step, 2) == (30 if rolling else 0)
