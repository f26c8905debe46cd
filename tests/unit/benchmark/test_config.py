"""Knobs of a run: the files say what the schema says, every form of an override works, and none is dropped silently."""

from pathlib import Path

import pytest
import yaml

from sarathi.benchmark.config.document import DEFAULT_FILE, README, default_yaml, readme_with_table
from sarathi.benchmark.config.engine import engine_config, sized_backend
from sarathi.benchmark.config.options import as_words, canonical, parse_options
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.config.knobs import ConfigError, knobs_of
from sarathi.config.load import load_config, to_dict
from sarathi.config.schema import CacheConfig


def test_default_file_is_the_schema() -> None:
    assert DEFAULT_FILE.read_text() == default_yaml(), "run python -m sarathi.benchmark.config.document"
    assert load_config(BenchmarkConfig, DEFAULT_FILE) == BenchmarkConfig()


def test_default_file_names_every_knob() -> None:
    tree = yaml.safe_load(DEFAULT_FILE.read_text())
    for knob in knobs_of(BenchmarkConfig):
        value = tree
        for part in knob.path.split("."):
            value = value[part]
        assert value == knob.default


def test_readme_explains_every_knob() -> None:
    text = README.read_text()
    assert readme_with_table(text) == text, "run python -m sarathi.benchmark.config.document"


@pytest.mark.parametrize(
    "words",
    [
        ["--model.attention_backend", "fa_vattn"],
        ["--model_attention_backend", "fa_vattn"],
        ["--attention_backend", "FA_VATTN"],
        ["--attention-backend=Fa_Vattn"],
    ],
)
def test_every_form_of_an_override(words: list[str]) -> None:
    assert parse_options(words).model.attention_backend == "fa_vattn"


def test_file_and_overrides(tmp_path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("seed: 3\nreplica_scheduler:\n  provider: VLLM\n  max_batch_size: 7\n")
    config = parse_options(["--config", str(path), "--max_batch_size", "9", "--write_json_trace"])
    assert (config.seed, config.replica_scheduler.provider, config.replica_scheduler.max_batch_size) == (3, "vllm", 9)
    assert config.write_json_trace


@pytest.mark.parametrize(
    ("knob", "written", "text"),
    [
        ("model.block_size", "16", "16"),
        ("trace_request_generator.date", "2023-08-21", "2023-08-21"),
        ("trace_request_interval_generator.start_time", "2024-05-01 12:00:00", "2024-05-01 12:00:00"),
    ],
)
def test_what_yaml_takes_for_a_number_or_a_date_is_text_to_a_knob_of_text(
    knob: str, written: str, text: str, tmp_path: Path
) -> None:
    section, _, name = knob.partition(".")
    path = tmp_path / "run.yml"
    path.write_text(f"{section}:\n  {name}: {written}\n")
    assert getattr(getattr(load_config(BenchmarkConfig, path), section), name) == text


def test_a_truth_value_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("model:\n  block_size: yes\n")
    with pytest.raises(ConfigError, match=r"model\.block_size is True: it must be text"):
        load_config(BenchmarkConfig, path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.atention_backend", "x"], "nearest known is 'model.attention_backend'"),
        (["--chunk_size", "64"], "sarathi_scheduler.chunk_size or simple_chunking_scheduler.chunk_size"),
        (["--replica_scheduler_provider", "sarthi"], "the nearest is 'sarathi'"),
        (["seed", "3"], "unexpected argument 'seed'"),
        (["--seed", "-1"], "seed is '-1'"),
        (["--output_dir", "--seed", "3"], "--output_dir needs a value"),
        (["--write_metrics", "--seed"], "--seed needs a value"),
        (["--config"], "--config needs a value"),
        (
            ["--write_json_trace", "--write_metrics", "no"],
            "write_json_trace is True: it must be false if write_metrics",
        ),
        (["--atention_backend"], "nearest known is 'model.attention_backend'"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(words)


def test_settings_survive_a_command_line() -> None:
    settings = {"model.max_model_len": None, "seed": 7, "replica_scheduler.provider": "orca", "write_metrics": False}
    assert canonical(settings) == settings
    config = parse_options(as_words(settings))
    assert (config.model.max_model_len, config.seed, config.write_metrics) == (None, 7, False)


def test_result_of_a_run_reads_back() -> None:
    config = parse_options(["--seed", "5", "--wandb_project", "p", "--max_model_len", "100"])
    assert load_config(BenchmarkConfig, overrides=_flat(to_dict(config))) == config


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def test_engine_gets_every_knob_of_the_model() -> None:
    words = ["--model.name=yi-6b-200k", "--max_model_len=4096", "--load_format=dummy", "--dtype=bfloat16", "--seed=11"]
    words += ["--gpu_memory_utilization=0.5", "--kv_cache_bytes=1gb", "--device=cpu", "--attention_backend=sdpa_vattn"]
    words += ["--tensor_parallel_degree=2", "--max_batch_size=33", "--replica_scheduler.provider=sarathi"]
    words += ["--sarathi_scheduler.chunk_size=96"]
    engine = engine_config(parse_options(words))
    model = engine.model
    assert (model.model, model.max_model_len, model.load_format, model.dtype) == (
        "yi-6b-200k",
        4096,
        "dummy",
        "bfloat16",
    )
    assert (model.seed, model.device, str(model.attention_backend)) == (11, "cpu", "sdpa_vattn")
    assert (engine.cache.memory_bytes, engine.cache.gpu_memory_utilization) == (2**30, 0.5)
    assert (engine.parallel.tensor_parallel_size, engine.scheduler.max_num_seqs) == (2, 33)
    assert (engine.scheduler.type, engine.scheduler.chunk_size) == ("sarathi", 96)


def test_prefixes_are_shared_only_where_that_is_asked_for() -> None:
    """Sarathi-Serve and vAttention have no prefix caching, and runs that share an engine repeat their prompts."""
    assert CacheConfig().prefix_caching and not engine_config(parse_options([])).cache.prefix_caching
    assert engine_config(parse_options(["--prefix_caching=true"])).cache.prefix_caching


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--replica_scheduler.provider=vllm", "--max_tokens_in_batch=100"], {"max_batched_tokens": 100}),
        (
            ["--replica_scheduler.provider=simple_chunking", "--simple_chunking_scheduler.chunk_size=80"],
            {"chunk_size": 80},
        ),
        (["--replica_scheduler.provider=orca", "--max_tokens_in_batch=100"], {"max_batched_tokens": 100}),
    ],
)
def test_engine_gets_the_policy_knobs(words: list[str], expected: dict) -> None:
    scheduler = to_dict(engine_config(parse_options(words)))["scheduler"]
    assert {name: scheduler[name] for name in expected} == expected


def test_dynamic_and_learned_chunks() -> None:
    dynamic = engine_config(parse_options(["--enable_dynamic_chunking_schedule", "--low_chunk_size=32"])).scheduler
    assert (dynamic.chunk_budget.policy, dynamic.chunk_budget.low_chunk_size) == ("schedule", 32)
    learned = engine_config(parse_options(["--target_step_time=0.02"])).scheduler
    assert (learned.chunk_budget.policy, learned.chunk_budget.target_step_s) == ("latency", 0.02)
    with pytest.raises(ConfigError, match="either scheduled or learned"):
        engine_config(parse_options(["--target_step_time=0.02", "--enable_dynamic_chunking_schedule"]))


@pytest.mark.parametrize(
    ("backend", "size", "expected"),
    [
        ("fa_vattn", "2097152", "fa_vattn_2mb"),
        ("sdpa_vattn_megacache", "64kb", "sdpa_vattn_megacache_64kb"),
        ("fi_paged", "16", "fi_paged_16"),
        ("fa_vattn_2mb", None, "fa_vattn_2mb"),
    ],
)
def test_block_size_is_the_backends_granularity(backend: str, size: str | None, expected: str) -> None:
    assert sized_backend(backend, size) == expected


def test_two_sizes_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="gives a size already"):
        sized_backend("fa_vattn_2mb", "64kb")
    with pytest.raises(ConfigError, match=r"needs model\.attention_backend to name a backend"):
        sized_backend("auto", "64kb")


def test_operations_are_timed_without_graphs() -> None:
    assert engine_config(parse_options(["--enable_op_level_metrics"])).model.enforce_eager
    assert not engine_config(parse_options([])).model.enforce_eager
