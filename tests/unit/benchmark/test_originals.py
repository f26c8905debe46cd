"""Command lines and files of vAttention's and Sarathi-Serve's artifacts: each is taken, and gives their lengths.

Names and values are those of the scripts, models and sizes aside; traces are made here, with the same columns.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sarathi.benchmark.config.engine import engine_config, sized_backend
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.workload import generate_requests
from sarathi.config.knobs import ConfigError
from sarathi.config.schema import SchedulerConfig
from sarathi.core.scheduler.prefill_policy import ChunkedPrefill
from sarathi.core.scheduler.request_state import Step
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

SEED = 0  # set anew for each test: see tests/conftest.py
ASPLOS = {
    "figure 7": "--request_generator_provider synthetic --synthetic_request_generator_length_provider uniform "
    "--synthetic_request_generator_interval_provider static --uniform_request_length_generator_max_tokens 64 "
    "--uniform_request_length_generator_min_tokens 64 --uniform_request_length_generator_prefill_to_decode_ratio 500 "
    "--replica_scheduler_provider vllm --trace_request_length_generator_prefill_scale_factor 1 "
    "--trace_request_length_generator_decode_scale_factor 1 --replica_scheduler_max_batch_size 4 "
    "--vllm_scheduler_max_tokens_in_batch 64 --model_max_model_len 64 --trace_request_generator_max_tokens 64",
    "figure 8": "--request_generator_provider synthetic --synthetic_request_generator_interval_provider static "
    "--replica_scheduler_provider sarathi --sarathi_scheduler_chunk_size 16384 "
    "--vllm_scheduler_max_tokens_in_batch 196608 --model_max_model_len 262144 "
    "--trace_request_length_generator_min_tokens 65536 --trace_request_length_generator_max_tokens 196608 "
    "--trace_request_length_generator_prefill_scale_factor 1",
    "figure 9": "--request_generator_provider synthetic --synthetic_request_generator_interval_provider poisson "
    "--poisson_request_interval_generator_qps 0.2 --replica_scheduler_provider vllm "
    "--vllm_scheduler_max_tokens_in_batch 65536 --model_max_model_len 65536 "
    "--trace_request_length_generator_min_tokens 16384 --trace_request_length_generator_max_tokens 65536 "
    "--trace_request_length_generator_prefill_scale_factor 1",
    "figure 11": "--request_generator_provider synthetic --synthetic_request_generator_interval_provider static "
    "--replica_scheduler_provider vllm --vllm_scheduler_max_tokens_in_batch 32768 "
    "--replica_scheduler_max_batch_size 64 --model_max_model_len 32768 "
    "--trace_request_length_generator_prefill_scale_factor 1 --trace_request_length_generator_min_tokens 128 "
    "--trace_request_length_generator_max_tokens 32768",
}
SHARED = (
    "--metrics_store_enable_op_level_metrics false --metrics_store_keep_individual_batch_metrics true "
    "--model_block_size 2097152 --model_attention_backend fa_vattn --gpu_memory_utilization 0.9"
)
LIMITS = {"figure 8": (65536, 196608), "figure 9": (16384, 65536), "figure 11": (128, 32768)}
OSDI = {
    "figure 1": "--cluster_num_replicas 1 --model_pipeline_parallel_degree 1 --request_generator_provider synthetic "
    "--synthetic_request_generator_interval_provider static --synthetic_request_generator_length_provider trace "
    "--trace_request_length_generator_max_tokens 16384 --trace_request_length_generator_prefill_scale_factor 1 "
    "--trace_request_length_generator_decode_scale_factor 1 --replica_scheduler_provider sarathi "
    "--replica_scheduler_max_batch_size 256 --sarathi_scheduler_chunk_size 1536 "
    "--sarathi_scheduler_enable_rolling_prefills true --sarathi_scheduler_enable_dynamic_chunking_schedule false",
    "table 6": "--request_generator_provider synthetic --synthetic_request_generator_length_provider trace "
    "--synthetic_request_generator_interval_provider poisson --trace_request_length_generator_max_tokens 8192 "
    "--model_max_model_len 8192 --replica_scheduler_provider simple_chunking --replica_scheduler_max_batch_size 128 "
    "--sarathi_scheduler_chunk_size 512 --sarathi_scheduler_enable_rolling_prefills t "
    "--poisson_request_interval_generator_qps 1 --time_limit 1800 --metrics_store_enable_request_outputs 0 "
    "--metrics_store_keep_individual_batch_metrics f --write_chrome_trace false",
}
DEFAULT_YML = """
seed: 42
output_dir: ./benchmark_output/
write_json_trace: true
gpu_memory_utilization: 0.85
time_limit: 0
replica_resource_mapping: ""
cluster: {num_replicas: 1}
model: {name: meta-llama/Meta-Llama-3-8B, tensor_parallel_degree: 2, max_model_len: 4096, load_format: dummy,
        attention_backend: vattn_fa, block_size: 128}
synthetic_request_generator: {length_provider: trace, interval_provider: static, num_requests: 64}
trace_request_generator: {trace_file: ./data/sydney.csv, date: '2023-08-21', max_tokens: 32768}
trace_request_length_generator: {trace_file: ./data/sharegpt.csv, max_tokens: 32768, min_tokens: 8192}
trace_request_interval_generator: {trace_file: ./data/azure.csv, start_time: "1970-01-04 12:00:00"}
replica_scheduler: {provider: sarathi, max_batch_size: 128}
vllm_scheduler: {max_tokens_in_batch: null}
"""


def made_trace(folder: Path, high: int) -> tuple[Path, pd.DataFrame]:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    lengths = {"num_prefill_tokens": rng.integers(1, high, 400), "num_decode_tokens": rng.integers(1, high // 8, 400)}
    frame = pd.DataFrame(lengths)
    frame.to_csv(folder / "trace.csv", index=False)
    return folder / "trace.csv", frame


@pytest.mark.parametrize("name", LIMITS)
def test_lengths_of_the_asplos_figures(name: str, tmp_path: Path) -> None:
    low, high = LIMITS[name]
    path, frame = made_trace(tmp_path, high + high // 4)
    total = frame.sum(axis=1)
    cut = (frame - np.ceil(frame.div(total, axis=0).mul((total - high).clip(lower=0), axis=0)).astype(int)).clip(
        lower=1
    )
    expected = cut[cut.num_prefill_tokens > low].sample(frac=1, random_state=42).head(50)
    words = [*ASPLOS[name].split(), *SHARED.split(), "--synthetic_request_generator_num_requests=50"]
    config = parse_options([*words, f"--trace_request_length_generator_trace_file={path}"])
    found = generate_requests(config)
    assert [[spec.num_prefill_tokens, spec.num_decode_tokens] for spec in found] == expected.values.tolist()
    assert str(engine_config(config).model.attention_backend) == "fa_vattn_2mb"


def test_figure_7_is_told_what_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    config = parse_options([*ASPLOS["figure 7"].split(), *SHARED.split(), "--num_requests=4"])
    (spec,) = set(generate_requests(config))
    assert (spec.num_prefill_tokens, spec.num_decode_tokens) == (63, 1)
    told = "trace_request_length_generator.decode_scale_factor has no effect: "
    told += "synthetic_request_generator.length_provider is uniform, and only trace reads it"
    assert told in caplog.text
    assert "vllm_scheduler" not in caplog.text


@pytest.mark.parametrize("name", OSDI)
def test_osdi_command_lines_run_as_they_are(name: str, tmp_path: Path) -> None:
    path, frame = made_trace(tmp_path, 8000)
    words = [*OSDI[name].split(), f"--trace_request_length_generator_trace_file={path}", "--num_requests=400"]
    config = parse_options(words)
    found = sorted((spec.num_prefill_tokens, spec.num_decode_tokens) for spec in generate_requests(config))
    whole = sorted(map(tuple, frame.values.tolist()))
    assert found == whole if name == "figure 1" else len(found) == 400
    assert engine_config(config).scheduler.rolling_prefills


def test_the_originals_default_file_is_a_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "default.yml"
    path.write_text(DEFAULT_YML)
    config = parse_options(["--config", str(path), "--model_attention_backend", "sdpa_vattn"])
    assert (config.time_limit, config.synthetic_request_generator.num_requests) == (0, 64)
    assert str(engine_config(config).model.attention_backend) == "sdpa_vattn"
    assert "model.block_size 128 has no effect" in caplog.text
    assert parse_options(["--config", str(path)]).model.attention_backend == "fa_vattn"


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
