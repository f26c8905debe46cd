"""The one progress bar: what it counts, and where it is drawn."""

from types import SimpleNamespace
from typing import Any

import pytest

from sarathi.entrypoints import progress
from sarathi.entrypoints.progress import RequestBar, show_progress


def output(num_tokens: int, finished: bool) -> Any:
    return SimpleNamespace(
        finished=finished, prompt_token_ids=[0] * 30, outputs=[SimpleNamespace(num_tokens=num_tokens)]
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rates_are_those_since_the_last_drawing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with RequestBar(3, "backend", shown=True) as bar:
        bar.add(0, output_tokens=4, prompt_tokens=100)
        clock[0] += 2.0
        bar.add(1, output_tokens=6)
        clock[0] += 1.0
        bar.add(2, output_tokens=7)
    said = capsys.readouterr().err
    assert "in 50, out 5 tokens/s" in said and "out 7 tokens/s" in said
    assert "backend: 100%" in said and "3/3" in said


def test_outputs_pass_through_and_nothing_is_drawn_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    given = [(0, output(1, False)), (1, output(1, False)), (0, output(2, True)), (1, output(3, True))]
    assert list(show_progress(iter(given), 2)) == given
    assert capsys.readouterr() == ("", "")


def test_tokens_of_a_stream_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int, int]] = []
    monkeypatch.setattr(RequestBar, "is_hidden", False)
    monkeypatch.setattr(RequestBar, "add", lambda bar, *counts: counted.append(tuple(map(int, counts))))
    given = [(0, output(1, False)), (1, output(2, False)), (0, output(2, True)), (1, output(5, True))]
    assert list(show_progress(iter(given), 2)) == given
    assert counted == [(0, 1, 30), (0, 2, 30), (1, 1, 0), (1, 3, 0)]
