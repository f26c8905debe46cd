"""Tensors that keep their addresses while their memory goes to the system and comes again."""

import random
import re
from math import prod
from pathlib import Path

import pytest
import torch

from vattention import Arena, VAttentionError

PAGE = 64 * 1024


def shared_bytes() -> int:
    """Of this process: where host memory of the allocator is counted."""
    return int(Path("/proc/self/status").read_text().partition("RssShmem:")[2].split()[0]) * 1024


def fill(tensors: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Random bytes into each; copies of them."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).random_(0, 256, generator=generator)
    return [tensor.clone() for tensor in tensors]


def same(tensors: list[torch.Tensor], copies: list[torch.Tensor]) -> bool:
    return all(
        a.view(-1).view(torch.uint8).equal(b.view(-1).view(torch.uint8)) for a, b in zip(tensors, copies, strict=True)
    )


def test_addresses_stay_and_memory_goes() -> None:
    arena = Arena(1 << 40)
    tensors = [arena.empty((2000, 1000), torch.float32), arena.empty((3,), "bfloat16"), arena.empty((999, 7), "int8")]
    view, addresses = tensors[2][10:20].t(), [tensor.data_ptr() for tensor in tensors]
    assert not arena.is_mapped and arena.created_bytes == 0 and arena.used_bytes >= 8_000_000
    for seed in (1, 2):
        before = shared_bytes()
        arena.map()
        copies = fill(tensors, seed)
        assert arena.is_mapped and arena.created_bytes == -(-arena.used_bytes // PAGE) * PAGE
        assert shared_bytes() - before >= 8_000_000
        arena.map()
        assert same(tensors, copies) and view.t().equal(copies[2][10:20])
        arena.check_integrity()
        arena.release()
        assert not arena.is_mapped and arena.created_bytes <= PAGE
        assert shared_bytes() - before < 1_000_000
        arena.release()
        arena.check_integrity()
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    arena.close()
    arena.close()
    with pytest.raises(VAttentionError, match="closed"):
        arena.map()


def test_tensors_lie_apart_whenever_they_were_made() -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng, arena, tensors = random.Random(seed), Arena(64 << 20), []
    for number in range(60):
        if number % 10 == 5:
            (arena.release if arena.is_mapped else arena.map)()
        shape = [rng.choice([0, 1, 3, 40, 200]) for _ in range(rng.randrange(4))]
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.int8, torch.float64])
        tensor = arena.empty(shape, dtype)
        assert list(tensor.shape) == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % 512 == 0 or not tensor.numel()
        if arena.is_mapped:
            fill([tensor], number)
        tensors.append(tensor)
    arena.map()
    assert same(tensors, fill(tensors, seed))
    assert arena.used_bytes >= sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    arena.check_integrity()


@pytest.mark.parametrize("shape", [(PAGE + 1,), (2**40, 2**40)])
def test_a_tensor_that_does_not_fit_changes_nothing(shape: tuple[int, ...]) -> None:
    arena = Arena(PAGE)
    with pytest.raises(ValueError, match=f"{re.escape(str(shape))} takes {prod(shape)} bytes: 0 of max_bytes=65536"):
        arena.empty(shape, torch.int8)
    assert arena.used_bytes == 0 and arena.empty((PAGE,), torch.int8).shape == (PAGE,)


def test_an_empty_arena_may_be_mapped() -> None:
    arena = Arena(1)
    arena.map()
    assert arena.is_mapped and arena.max_bytes == PAGE
    arena.release()
    assert not arena.is_mapped
