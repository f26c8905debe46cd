"""Options of scripts in experiments/*.yml. No engine and no GPU."""

import argparse
import csv
import importlib
import sys
from pathlib import Path

import pytest
import yaml

from sarathi.benchmark.config.program import EXPERIMENTS, parse_with_file, positive
from sarathi.benchmark.experiment.command import script_of

YAML = """
program: shipped
test: {base: {steps: 2}}
base:
  models: [a, b]
  steps: 100
"""

HEAD = "program: shipped\n"
SHORT = HEAD + "base: {models: [a], steps: 1}\n"


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    (tmp_path / "shipped.yml").write_text(YAML)
    path = tmp_path / "figure.yml"
    path.write_text(YAML)
    return path


def parsed(figure: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=("a", "b", "c"))
    parser.add_argument("--steps", type=positive)
    parser.add_argument("--title")
    parser.add_argument("--output")
    parser.add_argument("--test", action="store_true")
    monkeypatch.setattr(sys, "argv", ["script", "--figure", str(figure), *words])
    return parse_with_file(parser, "shipped", figure.parent)


@pytest.mark.parametrize(
    ("words", "models", "steps"),
    [((), ["a", "b"], 100), (("--test",), ["a", "b"], 2), (("--test", "--models", "c", "--steps", "7"), ["c"], 7)],
)
def test_the_file_gives_what_the_command_line_does_not(
    words: tuple[str, ...], models: list[str], steps: int, figure: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parsed(figure, *words, monkeypatch=monkeypatch)
    assert (found.models, found.steps) == (models, steps)


@pytest.mark.parametrize("words", [(), ("--test",)])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (YAML + "  step: 3", "'base.step' is unknown; the nearest of models, steps, title is 'steps'"),
        (YAML + "  5: 3", "'base.5' is unknown; the nearest of models, steps, title is "),
        (YAML + "  help: me", "'base.help' is unknown; the nearest of models, steps, title is "),
        (YAML + "  output: here", "'base.output' is unknown; the nearest of models, steps, title is "),
        (HEAD + "base: {models: [a]}", "base.steps is missing; a file has models, steps"),
        (HEAD + "base: {models: [a], steps: many}", "base.steps is 'many': argument --steps: 'many': it must be an"),
        (HEAD + "base: {models: [a], steps: 0}", "argument --steps: '0': it must be an integer, at least 1"),
        (HEAD + "base: {models: [a], steps: 2.5}", "argument --steps: '2.5': it must be an integer, at least 1"),
        (HEAD + "base: {models: [a], steps: true}", "base.steps is True: it must be text, a number, or a list of them"),
        (HEAD + "base: {models: [a], steps: }", "base.steps is None: it must be text, a number, or a list of them"),
        (HEAD + "base: {models: [a], steps: [1, 2]}", "base.steps is [1, 2]: it must be one value"),
        (HEAD + "base: {models: [a], steps: [1]}", "base.steps is [1]: it must be one value"),
        (HEAD + "base: {models: [a, d], steps: 1}", "argument --models: invalid choice: 'd' (choose from"),
        (HEAD + "base: {models: [a, [b]], steps: 1}", "base.models is ['a', ['b']]: it must be text, a number, or a"),
        (HEAD + "base: {models: [], steps: 1}", "base.models is []: argument --models: expected at least one argument"),
        (YAML + "  title: {a: 1}", "base.title is {'a': 1}: it must be text, a number, or a list of them"),
        (SHORT + "test: {base: {step: 1}}", "'test.base.step' is unknown; the nearest of models, steps, title is"),
        (SHORT + "test: {base: {steps: x}}", "test.base.steps is 'x': argument --steps: 'x': it must be an integer"),
        (SHORT + "test: {steps: 1}", "test has steps: it must have base alone"),
        (SHORT + "test: {base: 5}", "test.base is 5: it must be a mapping"),
        (SHORT + "test: 5", "test is 5: it must be a mapping"),
        (SHORT + "test:", "test is None: it must be a mapping"),
        (SHORT + "grid: {}", "'grid' is unknown; a program's file has program, base and test"),
        ("base: {models: [a], steps: 1}", "program is None: it must be 'shipped'"),
        (HEAD, "base is None: it must be a mapping"),
        ("- steps", "it is ['steps']: it must be a mapping"),
        ("", "it is None: it must be a mapping"),
    ],
)
def test_what_the_file_must_not_say(
    text: str,
    told: str,
    words: tuple[str, ...],
    figure: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figure.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parsed(figure, *words, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"{figure}: " in said and told in said


def test_a_file_that_is_not_there_is_named(
    figure: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(figure.with_name("none.yml"), monkeypatch=monkeypatch)
    assert f"{figure.with_name('none.yml')}: " in capsys.readouterr().err


def shipped(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The options of a script that is told these words."""
    if name == "kernels":
        pytest.importorskip("triton", reason="the kernels that are measured need triton")
    script = importlib.import_module(f"benchmark_{name}")
    monkeypatch.setattr(sys, "argv", ["script", *words])
    return (script.read_options if name == "allocator" else script.parse)()


@pytest.mark.parametrize("name", [path.stem for path in sorted(EXPERIMENTS.glob("*.yml")) if script_of(path)])
def test_scripts_read_the_shipped_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load((EXPERIMENTS / f"{name}.yml").read_text())
    short, content = content.get("test", {}).get("base"), content["base"]
    found = vars(shipped(name, monkeypatch=monkeypatch))
    for key, value in content.items():
        assert found[key] is not None
        if not isinstance(value, list):
            assert str(found[key]) == str(value) or found[key] == float(value)
        else:
            assert len(found[key]) == len(value)
    if short is not None:
        found = vars(shipped(name, "--test", monkeypatch=monkeypatch))
        assert {key: found[key] for key in short} == short


def test_the_prompts_of_the_allocator_figure_are_a_stagger_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmark_allocator

    from sarathi.benchmark.records import Table

    options = shipped("allocator", monkeypatch=monkeypatch)
    prompts = benchmark_allocator.Decodes(options, Table(tmp_path / "allocator.csv")).prompts
    assert prompts == list(range(512, 512 + 64 * 16, 16)) and options.steps == 2048


def test_page_sizes_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmark_page_size

    figure = tmp_path / "figure.yml"
    figure.write_text("""
program: page_size
base:
  models: [Yi-34B-200K, Yi-6B-200K]
  pages: [1mb, 4mb]
  layouts: [per layer]
  tensor_parallel: [2]
  budget_bytes: 8e9
  trace: arxiv
  samples: 1
""")
    monkeypatch.setattr(sys, "argv", ["script", "--figure", str(figure), "--output", str(tmp_path)])
    benchmark_page_size.main()
    with (tmp_path / "max_batch_arxiv_shape.csv").open(newline="") as file:
        rows = [(row["model"], int(row["page_kib"]), row["layout"]) for row in csv.DictReader(file)]
    assert rows == [(model, page, "per layer") for model in ("Yi-34B-200K", "Yi-6B-200K") for page in (1024, 4096)]


def test_every_shape_of_the_kernels_figure_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = shipped("kernels", monkeypatch=monkeypatch)
    import benchmark_kernels  # needs triton, which shipped() has seen to

    from sarathi.benchmark.records import Table

    names = [name for name, _ in benchmark_kernels.attention(Table(tmp_path / "kernels.csv"), options)]
    decodes, prefills = ([name for name in names if name.startswith(work)] for work in ("decode", "prefill"))
    assert len(names) == len(set(names)) == len(decodes) + len(prefills)
    assert len(decodes) == len(options.decode) * len(options.models) == 28
    whole = [tokens for tokens in options.prefill if tokens <= options.chunk]
    assert len(prefills) == len(options.models) * (2 * len(options.prefill) - len(whole))
