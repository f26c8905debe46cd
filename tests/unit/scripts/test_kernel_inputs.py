"""Inputs of the attention benchmarks on the CPU: pages hold the same tokens, and the float64 reference is right."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="the benchmarked kernels need triton")

from sarathi.benchmark.kernels.attention import Equal, available_attention
from sarathi.benchmark.kernels.paging import Inputs, as_pages, exact_output
from sarathi.benchmark.kernels.shapes import TINY


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on CUDA are made on the CPU."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    seed = random.randrange(10**6)
    print("seed", seed)
    torch.manual_seed(seed)
    with OnCpu():
        yield


@pytest.mark.parametrize(("batch", "new", "context"), [(5, 1, 32), (1, 32, 32), (1, 8, 48), (1, 2, 16), (2, 3, 16)])
def test_the_reference_is_attention_in_the_order_of_the_slots(batch: int, new: int, context: int) -> None:
    inputs = Inputs.create(TINY, batch, new, context, copies=1)
    expected, checked = exact_output(inputs)
    assert len(checked) == min(batch, 2) * min(new, 4)
    keys, values = (x[inputs.slots.long()].double() for x in inputs.layers[0])
    (attend,) = available_attention(TINY, Equal(batch, new, context, context))
    found = attend(inputs.q.double(), (keys, values))[checked]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("batch", "page"), [(4, 16), (1, 8), (3, 48)])
def test_pages_hold_the_tokens_of_each_slot_in_order(batch: int, page: int) -> None:
    inputs = Inputs.create(TINY, batch, 1, 48, copies=2)
    table, layers = as_pages(inputs, page)
    assert table.shape == (batch, 48 // page) and sorted(table.flatten()) == list(range(batch * 48 // page))
    for layer, paged in zip(inputs.layers, layers, strict=True):
        for tokens, pool in zip(layer, paged, strict=True):
            assert torch.equal(pool[table.long()].flatten(1, 2), tokens[inputs.slots.long()])
