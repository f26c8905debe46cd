"""Dataclasses of tensors there and back: every shape, dtype and value, and nothing shared with what was sent."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sarathi.worker.transfer import to_device, to_host


@dataclass(frozen=True)
class Inner:
    values: Tensor
    label: str


@dataclass(frozen=True)
class Outer:
    wide: Tensor
    inner: Inner
    nothing: Inner | None
    empty: Tensor


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64, torch.int64, torch.bool])
def test_all_tensors_arrive_as_they_were(dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (3, 5)).to(dtype)
    sent = Outer(torch.randn(7, 1, dtype=torch.float64), Inner(values.t(), "kept"), None, torch.empty(0, 4))
    there = to_device(sent, torch.device("cpu"))
    assert there.wide.data_ptr() % 16 == there.inner.values.data_ptr() % 16 == 0  # see _ALIGNMENT_BYTES
    arrived = to_host(there)
    assert arrived.nothing is None and arrived.inner.label == "kept"
    for ours, theirs in ((arrived.wide, sent.wide), (arrived.inner.values, values.t()), (arrived.empty, sent.empty)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    sent.wide.fill_(99.0)
    assert not (arrived.wide == 99.0).any()


def test_none_is_a_tree_too() -> None:
    assert to_host(None) is None
