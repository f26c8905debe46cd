"""What scripts measure, read from experiments/scripts/*.yml. No engine and no GPU."""

import argparse
import sys
from pathlib import Path

import pytest
from measurement.options import parse_figure

FIGURES = sorted((Path(__file__).parents[3] / "experiments" / "scripts").glob("*.yml"))
YAML = """
models: [a, b]
steps: 100
test: {steps: 2}
"""


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    path = tmp_path / "figure.yml"
    path.write_text(YAML)
    return path


def parsed(figure: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=("a", "b", "c"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--test", action="store_true")
    monkeypatch.setattr(sys, "argv", ["script", "--figure", str(figure), *words])
    return parse_figure(parser, "kernels")


@pytest.mark.parametrize(
    ("words", "models", "steps"),
    [((), ["a", "b"], 100), (("--test",), ["a", "b"], 2), (("--test", "--models", "c", "--steps", "7"), ["c"], 7)],
)
def test_the_file_gives_what_the_command_line_does_not(
    words: tuple[str, ...], models: list[str], steps: int, figure: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parsed(figure, *words, monkeypatch=monkeypatch)
    assert (found.models, found.steps) == (models, steps)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step: 3", "'step' is unknown; the nearest of models, steps is 'steps'"),
        ("steps: many", "argument --steps: invalid int value: 'many'"),
        ("models: [a, d]", "argument --models: invalid choice: 'd' (choose from"),
        ("- steps", "it must be a mapping of option to value"),
    ],
)
def test_what_the_file_must_not_say(
    text: str, told: str, figure: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parsed(figure, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"{figure}: " in said and told in said


def test_every_shape_of_the_kernels_figure_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels that are measured need triton")
    import benchmark_kernels
    from measurement.table import Table

    monkeypatch.setattr(sys, "argv", ["script", "--output", str(tmp_path)])
    options = benchmark_kernels.parse()
    names = [name for name, _ in benchmark_kernels.attention(Table(tmp_path / "kernels.csv"), options)]
    decodes, prefills = ([name for name in names if name.startswith(work)] for work in ("decode", "prefill"))
    assert len(names) == len(set(names)) == len(decodes) + len(prefills)
    assert len(decodes) == len(options.decode) * len(options.models) == 28
    whole = [tokens for tokens in options.prefill if tokens <= options.chunk]
    assert len(prefills) == len(options.models) * (2 * len(options.prefill) - len(whole))
