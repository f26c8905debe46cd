"""Configuration: three ways to name a knob, and an answer to every way to get it wrong."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import yaml

from sarathi.config.backend import BackendSpec
from sarathi.config.knobs import ConfigError, Knob, knobs_of
from sarathi.config.load import find_knob, load_config, make_config, to_dict
from sarathi.config.schema import EngineConfig, ModelConfig, SchedulerConfig
from sarathi.config.vllm_names import VLLM_NAMES

KNOBS = knobs_of(EngineConfig)


def another_value(knob: Knob) -> object:
    """A valid value that is not the default, drawn at random."""
    if knob.value_type is bool:
        return not knob.default
    if knob.leaf == "attention_backend":
        return BackendSpec.parse(random.choice(("fa_vattn_sync_2mb", "sdpa_paged_16")))
    if knob.limits.choices:
        return random.choice([choice for choice in knob.limits.choices if choice != knob.default])
    if knob.value_type is str:
        return f"text{random.randrange(1000)}"
    if knob.value_type is float:
        return random.uniform(max(knob.limits.low, 0.011), min(knob.limits.high, 0.4))
    low = int(max(knob.limits.low, 1))
    low, high = {"low_chunk_size": (1, 63), "high_chunk_size": (100, 999)}.get(knob.leaf, (low + 1000, low + 2000))
    return random.randint(low, high)


def value_at(config: object, path: str) -> object:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.path)
def test_every_knob_can_be_set_by_path_by_flat_name_and_by_its_last_part(knob: Knob, tmp_path: Path) -> None:
    value = another_value(knob)
    assert value != knob.default and value_at(EngineConfig(), knob.path) == knob.default
    assert knob.help and knob.allowed
    named = [knob.path, knob.flat, knob.leaf, knob.flat.replace("_", "-").upper()]
    for name in named:
        assert value_at(load_config(EngineConfig, overrides={name: value}), knob.path) == value
        assert value_at(load_config(EngineConfig, overrides={name: str(value).upper()}), knob.path) in (
            value, str(value).upper(),
        )  # fmt: skip
    tree = str(value) if isinstance(value, BackendSpec) else value
    for name in reversed(knob.path.split(".")):
        tree = {name: tree}
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(tree))
    assert value_at(load_config(EngineConfig, file), knob.path) == value
    assert value_at(load_config(EngineConfig, file, {knob.leaf: knob.default}), knob.path) == knob.default


def test_no_two_knobs_end_alike() -> None:
    """What LLM(...) and the command line offer under short names must stay unique."""
    assert len({knob.leaf for knob in KNOBS}) == len(KNOBS)


def test_a_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = load_config(EngineConfig, overrides={knob.path: another_value(knob) for knob in KNOBS})
    file = tmp_path / "saved.yml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(EngineConfig, file) == config != EngineConfig()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scheduler.chunk_size", 0, "scheduler.chunk_size is 0: it must be an integer from 1 to 2147483647"),
        ("chunk_size", "many", "scheduler.chunk_size is 'many': it must be an integer"),
        ("chunk_size", 1.5, "scheduler.chunk_size is 1.5"),
        ("chunk_size", True, "scheduler.chunk_size is True"),
        ("chunk_size", None, "scheduler.chunk_size is None"),
        ("chunk_size", [1], "scheduler.chunk_size is"),
        ("chunk_size", float("inf"), "scheduler.chunk_size is inf"),
        ("watermark", 0.6, "scheduler.watermark is 0.6: it must be a number from 0 to 0.5"),
        ("watermark", "nan", "scheduler.watermark is 'nan'"),
        ("memory_bytes", "8 parsecs", "cache.memory_bytes is '8 parsecs'"),
        ("memory_bytes", 2**63, f"cache.memory_bytes is {2**63}: it must be an integer from 1 to {2**62}, or none"),
        ("memory_bytes", "9" * 30 + "tb", r"cache.memory_bytes is '9+tb': it must be an integer from 1 to"),
        ("memory_bytes", "9" * 400 + ".5gb", r"cache.memory_bytes is '9+\.\.\.: it must be an integer from 1 to"),
        ("seed", 2**64, f"model.seed is {2**64}: it must be an integer from 0 to {2**63 - 1}"),
        (
            "max_model_len",
            2**64,
            f"model.max_model_len is {2**64}: it must be an integer from 2 to 2147483647, or none",
        ),
        ("max_num_seqs", 2**31 - 1, "scheduler.max_num_seqs is 2147483647: it must be an integer from 1 to 1048576"),
        ("chunk_schedule_stages", 10**9, "chunk_schedule_stages is 1000000000: it must be an integer from 1 to 10000"),
        ("watermark", 10**400, r"scheduler.watermark is 10+\.\.\.: it must be a number from 0 to 0.5"),
        ("attention_backend", "sdpa_vattn_8388608tb", "a page of 9223372036854775808 bytes: .* 1kb, up to 1tb"),
        ("attention_backend", f"sdpa_vattn_{'9' * 5000}kb", r"backend 'sdpa_vattn_9+\.\.\.: '9+\.\.\. is not a size"),
        ("attention_backend", f"sdpa_paged_{'9' * 5000}", r"backend 'sdpa_paged_9+\.\.\.: '9+\.\.\. is not a size"),
        ("attention_backend", "sdpa_paged_9999999999", "a block of 9999999999 tokens: it must hold 1 to 2147483647"),
        ("scheduler_type", "sarahti", "scheduler.type is 'sarahti': .*the nearest is 'sarathi'"),
        ("dtype", 16, "model.dtype is 16: it must be one of auto, float32, float16, bfloat16"),
        ("low_chunk_size", 9999, "low_chunk_size is 9999: it must not exceed high_chunk_size, 2048"),
        ("attention_backend", "fa_vatn", "nearest known word is 'vattn'"),
        ("chunk_sise", 1, "unknown setting 'chunk_sise'; the nearest known is 'scheduler.chunk_size'"),
        ("schedular.chunk_size", 1, "unknown setting 'schedular.chunk_size'; .*'scheduler.chunk_size'"),
        ("model.chunk_size", 1, "unknown setting 'model.chunk_size'"),
        ("zzz", 1, "unknown setting 'zzz'; no known setting has a similar name"),
        ("x" * 10**6, 1, r"unknown setting 'x{50,60}\.\.\.; no known setting"),
        ("attention_backend", 16, "model.attention_backend is 16: it must be a name"),
    ],
)
def test_wrong_settings_are_refused_by_name_value_and_what_is_allowed(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(EngineConfig, overrides={name: value})


def test_a_number_that_python_does_not_write_is_refused_too() -> None:
    with pytest.raises(
        ConfigError, match=r"cache\.memory_bytes is a int too long to be written: it must be an integer"
    ):
        make_config(memory_bytes=10**5000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedular:\n  chunk_size: 5", "unknown setting 'schedular'; the nearest known is 'scheduler"),
        ("schedular:", "unknown setting 'schedular'"),
        ("scheduler:\n  chunk_sizes: 5", "unknown setting 'scheduler.chunk_sizes'; .*'scheduler.chunk_size'"),
        ("scheduler: sarathi", "scheduler is 'sarathi': it is a section and holds type, max_num_seqs"),
        ("scheduler:\n  chunk_size:\n    a: 1", "scheduler.chunk_size is"),
        ("- a\n- b", "holds list; it must hold sections"),
        ("a: [", "is not YAML"),
        ("a: 2023-13-45", "is not YAML: month must be in"),
        ("a: " + "[" * 5000, "is not YAML: maximum recursion"),
        ("scheduler: " + "9" * 5000, "is not YAML"),
        ("scheduler: [" + "x, " * 500_000 + "]", "is not YAML: it has more than 1000000 characters"),
    ],
)
def test_wrong_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(EngineConfig, file)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("joined", ["[{0}]", "{{x: {0}}}", "{{<<: [{0}]}}"])
def test_nested_anchors_are_bounded(joined: str, tmp_path: Path) -> None:
    """A kilobyte that means 9**30 values: in lists, in mappings and in merged keys."""
    lines = ["a0: &a0 {k: v}"]
    for index in range(1, 31):
        each = ", ".join([f"*a{index - 1}"] * 9) if "x:" not in joined else f"[{', '.join([f'*a{index - 1}'] * 9)}]"
        lines.append(f"a{index}: &a{index} {joined.format(each)}")
    file = tmp_path / "config.yml"
    file.write_text("\n".join(["scheduler:", *(f"  {line}" for line in lines), "cache: *a30"]))
    with pytest.raises(ConfigError):
        load_config(EngineConfig, file)
    file.write_text("\n".join([*lines, "scheduler: {chunk_size: *a30}"]))
    with pytest.raises(ConfigError, match="aliases stand for more than 1000000 values"):
        load_config(EngineConfig, file)
    file.write_text("a: &a [*a]")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(EngineConfig, file)


def test_anchors_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(
        "scheduler: &all\n  chunk_size: &size 64\n  max_num_seqs: *size\n  chunk_budget: {<<: {policy: latency}}"
    )
    assert load_config(EngineConfig, file) == make_config(chunk_size=64, max_num_seqs=64, policy="latency")


def test_a_missing_file_is_named_and_an_empty_one_is_the_default(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration '.*nothing\.yml'"):
        load_config(EngineConfig, tmp_path / "nothing.yml")
    (tmp_path / "empty.yml").write_text("scheduler:\n")
    assert load_config(EngineConfig, tmp_path / "empty.yml") == EngineConfig()


def test_sections_check_themselves_and_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match=r"SchedulerConfig\.max_num_seqs is 0"):
        SchedulerConfig(max_num_seqs=0)
    assert SchedulerConfig(type="VLLM").type == "vllm"
    assert ModelConfig(attention_backend="FA_64KB_VATTN").attention_backend == BackendSpec("fa", page_bytes=65536)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SchedulerConfig().chunk_size = 3


def test_text_stands_for_none_truth_and_sizes() -> None:
    config = make_config(max_model_len="none", memory_bytes="8gb", max_chunk_per_request="NULL", seed="7")
    assert (config.model.max_model_len, config.cache.memory_bytes, config.model.seed) == (None, 8 * 2**30, 7)


def test_a_name_with_several_meanings_asks_for_the_path() -> None:
    @dataclasses.dataclass(frozen=True)
    class Two(EngineConfig):
        other: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)

    with pytest.raises(ConfigError, match=r"could mean scheduler\.chunk_size or other\.chunk_size"):
        find_knob(Two, "chunk_size")
    assert load_config(Two, overrides={"other.chunk_size": 5}).other.chunk_size == 5


def test_the_largest_step_bounds_what_a_scheduler_may_ask_for() -> None:
    assert SchedulerConfig(chunk_size=300).max_step_tokens(1000) == 300
    assert SchedulerConfig(chunk_size=10**9, max_num_seqs=4).max_step_tokens(1000) == 4000
    assert SchedulerConfig(type="orca", max_num_seqs=4).max_step_tokens(1000) == 1004
    latency = make_config(policy="latency", high_chunk_size=777).scheduler
    assert latency.max_step_tokens(1000) == 777


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("max_num_batched_tokens", "it is called chunk_size here"),
        ("swap_space", "it is not supported here"),
        ("distributed-executor-backend", "it is called executor here"),
    ],
)
def test_settings_of_vllm_say_what_they_are_here(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_config(**{name: 1})


def test_no_setting_of_vllm_in_the_table_is_one_of_ours() -> None:
    names = {form for knob in knobs_of(EngineConfig) for form in (knob.leaf, knob.tail, knob.flat)}
    assert not names & set(VLLM_NAMES)


@pytest.mark.parametrize("name", ["velocity", "max_tokens_total", "kv_transfer_config", "temperature", "port"])
def test_a_name_like_none_is_not_taken_for_a_misspelled_one(name: str) -> None:
    with pytest.raises(ConfigError, match="no known setting has a similar name"):
        make_config(**{name: 1})


def test_a_knob_of_an_inner_section_by_its_last_two_parts() -> None:
    assert make_config(chunk_budget_policy="latency").scheduler.chunk_budget.policy == "latency"
