"""How kernels are compared: checked first, measured in turn. On the CPU, with kernels of a line."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from sarathi.benchmark.kernels.timing import compare_us, eager_sample, graph_sample, in_turn_us
from sarathi.benchmark.records import Attempts


def test_kernels_take_turns_so_that_a_card_that_slows_down_slows_all_of_them() -> None:
    order: list[str] = []

    def slower_each_time(name: str, factor: float) -> Callable[[], float]:
        return lambda: (order.append(name), factor * len(order))[1]

    found = in_turn_us({"a": slower_each_time("a", 1.0), "b": slower_each_time("b", 1.0)}, rounds=3)
    assert order == ["a", "b"] * 4, "one round is for warming up"
    assert found == {"a": 5.0, "b": 6.0}


def test_a_kernel_that_fails_or_is_wrong_is_told_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(8, 4)
    wrong = x.clone()
    wrong[-1] += 1

    def fails() -> None:
        raise RuntimeError("no such kernel")

    launches = {"right": lambda: lambda _: x, "wrong": lambda: lambda _: wrong, "absent": fails}
    attempts, one_copy = Attempts(), partial(graph_sample, copies=1)
    assert list(compare_us(attempts, launches.items(), x.double(), one_copy)) == ["right"]
    said = capsys.readouterr().out
    assert "wrong result" in said and "no such kernel" in said and attempts.failed == ["wrong", "absent"]
    found = compare_us(attempts, list(launches.items())[:2], x[:4].double(), one_copy, checked=slice(4))
    assert list(found) == ["right", "wrong"] and min(found.values()) > 0


@pytest.mark.parametrize(("make", "per_sample"), [(graph_sample, 9), (eager_sample, 1)])
def test_a_sample_walks_over_the_copies(make: Callable[..., Callable[[], float]], per_sample: int) -> None:
    walked: list[int] = []
    sample = make(walked.append, 3)
    assert sample() > 0 and sample() > 0
    assert walked == [i % 3 for i in range(2 * per_sample)]
