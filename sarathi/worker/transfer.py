"""Asynchronous copies of dataclasses of tensors between host and device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Tree = TypeVar("Tree")  # a tensor, or a dataclass whose fields are trees; anything else stays as it is
_ALIGNMENT_BYTES = 16  # Triton compiles a kernel a second time for tensors that are aligned to less


def to_device(tree: Tree, device: torch.device) -> Tree:
    """Copy CPU tensors to `device`, all in one copy. Does not wait for it."""
    parts = list(_tensors(tree))
    sizes = [-(-part.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for part in parts]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for view, part in zip(_views(packed, parts, sizes), parts, strict=True):
        view.copy_(part)
    arrived = _views(packed.to(device, non_blocking=True), parts, sizes)
    return cast(Tree, _mapped(tree, lambda _: next(arrived)))


def to_host(tree: Tree) -> Tree:
    """Copies on the host, valid once the device has reached this point of its stream."""
    return cast(Tree, _mapped(tree, _to_host))


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif is_dataclass(tree):
        for each in fields(tree):
            yield from _tensors(getattr(tree, each.name))


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tree with every tensor changed, in the order of _tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{each.name: _mapped(getattr(tree, each.name), change) for each in fields(tree)})
    return tree


def _views(packed: Tensor, parts: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """The pieces of `packed` [bytes] uint8 as tensors of the shapes and dtypes of `parts`."""
    for piece, part in zip(torch.split(packed, list(sizes)), parts, strict=True):
        yield piece[: part.nbytes].view(part.dtype).view(part.shape)
