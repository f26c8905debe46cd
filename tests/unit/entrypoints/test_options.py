"""Command-line options: all knobs, no clash, values to where they belong."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from sarathi.config.knobs import ConfigError, knobs_of
from sarathi.config.schema import EngineConfig
from sarathi.entrypoints.options import (
    add_config_options,
    add_sampling_options,
    config_from,
    given_config,
    given_sampling,
    sampling_from,
)
from sarathi.sampling_params import SamplingParams


def parse(*words: str, **defaults: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser, **defaults)
    add_config_options(parser)
    return parser.parse_args(words)


def test_every_knob_of_the_configuration_has_an_option() -> None:
    destinations = vars(parse())
    assert all(f"config:{knob.path}" in destinations for knob in knobs_of(EngineConfig))


def test_nothing_given_is_every_default() -> None:
    assert config_from(parse()) == EngineConfig()
    assert sampling_from(parse()) == SamplingParams()


def test_options_reach_their_knobs() -> None:
    config = config_from(
        parse("--memory-bytes", "2mb", "--chunk-size", "64", "--scheduler-type", "orca", "--model-seed", "5")
    )
    assert (config.cache.memory_bytes, config.scheduler.chunk_size) == (2 * 2**20, 64)
    assert (config.scheduler.type, config.model.seed) == ("orca", 5)


def test_options_win_over_the_file_and_forced_values_over_both(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text("scheduler: {chunk_size: 7, max_num_seqs: 3, watermark: 0.5}")
    config = config_from(parse("--config", str(path), "--max-num-seqs", "4", "--watermark", "0.2"), watermark=0.1)
    assert (config.scheduler.chunk_size, config.scheduler.max_num_seqs, config.scheduler.watermark) == (7, 4, 0.1)


def test_every_sampling_field_that_a_word_can_say_has_an_option() -> None:
    destinations = {option.dest for option in add_sampling_options(argparse.ArgumentParser())}
    names = {field.name for field in fields(SamplingParams)}
    only_in_python = {"logit_bias", "logits_processors", "structured_outputs", "cache_salt"}  # a salt parts users
    assert names - destinations == only_in_python


def test_sampling_options_reach_their_fields() -> None:
    words = "--n 2 --temperature 0.5 --top-k 3 --seed 9 --max-tokens none --stop a --stop b"
    words += " --stop-token-ids 4,5 --ignore-eos"
    expected = SamplingParams(
        n=2, temperature=0.5, top_k=3, seed=9, max_tokens=None, stop=["a", "b"], stop_token_ids=[4, 5], ignore_eos=True
    )
    assert sampling_from(parse(*words.split())) == expected
    assert sampling_from(parse(max_tokens=99)).max_tokens == 99


def test_what_is_given_is_known_from_what_is_a_default() -> None:
    args = parse("--temperature", "1", "--chunk-size", "64", "--config", "a.yml", max_tokens=99)
    assert given_sampling(args) == {"temperature": 1.0}
    assert given_config(args) == {"scheduler.chunk_size": "64", "config": "a.yml"}


def test_bad_values_are_errors_that_name_the_knob() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.chunk_size is '0'.*from 1 to"):
        config_from(parse("--chunk-size", "0"))
    with pytest.raises(ValueError, match="max_tokens is -3"):
        sampling_from(parse("--max-tokens", "-3"))
