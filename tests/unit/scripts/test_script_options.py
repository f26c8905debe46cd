"""What the scripts that run engines are told: the short form's changes, and what is said beside it."""

import sys
from argparse import ArgumentParser, Namespace

import pytest

from sarathi.benchmark.config.program import add_stages, engine_parser, parse


def told(*words: str, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    parser = engine_parser("test", "results")
    parser.add_argument("--seconds", type=float, default=200.0)
    monkeypatch.setattr(sys, "argv", ["script", *words])
    return parse(parser, {"seconds": 10.0, "chunk_size": 32})


def test_the_short_form_changes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    options = told("--test", monkeypatch=monkeypatch)
    assert (options.model, options.backend, options.device) == ("tiny", "sdpa_vattn", "cpu")
    assert (options.memory_bytes, options.max_num_seqs, options.chunk_size, options.seconds) == ("64mb", 8, 32, 10.0)


def test_the_command_line_stands_above_the_short_form(monkeypatch: pytest.MonkeyPatch) -> None:
    options = told("--backend", "sdpa_paged_16", "--test", "--seconds", "3", monkeypatch=monkeypatch)
    assert (options.backend, options.seconds, options.model) == ("sdpa_paged_16", 3.0, "tiny")


def test_without_it_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    options = told("--chunk-size", "512", monkeypatch=monkeypatch)
    assert (options.model, options.chunk_size, options.seconds) == ("llama-3-8b", 512, 200.0)


def test_a_figure_stands_below_the_short_form(monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmark_allocator

    monkeypatch.setattr(sys, "argv", ["script", "--test", "--steps", "7"])
    options = benchmark_allocator.read_options()
    assert (options.model, options.max_num_seqs, options.prompt, options.steps) == ("tiny", 8, 16, 7)


def test_an_unknown_stage_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    add_stages(parser, ("prefill", "decode"))
    assert parser.parse_args([]).stages == ["prefill", "decode"]
    assert parser.parse_args(["--stages", "decode,prefill"]).stages == ["decode", "prefill"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--stages", "prefil"])
    assert "prefil; known: prefill, decode" in capsys.readouterr().err
