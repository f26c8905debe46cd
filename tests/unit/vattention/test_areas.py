"""Linux lets a process have so many mapped areas (vm.max_map_count): a cache on the CPU stays far below, or says so."""

from pathlib import Path

import pytest
import torch

from vattention import OutOfMemoryError, VirtualKVCache

LIMIT = Path("/proc/sys/vm/max_map_count")


def make(num_slots: int, budget_bytes: int, **changes) -> VirtualKVCache:
    """As SmolLM2-135M: 60 regions of 768 bytes a token."""
    return VirtualKVCache(
        num_layers=30,
        num_kv_heads=3,
        head_size=64,
        num_slots=num_slots,
        max_tokens=8192,
        dtype=torch.float32,
        budget_bytes=budget_bytes,
        **changes,
    )


def mapped_areas() -> int:
    return sum("memfd:vattention" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_full_house_of_growing_requests_gets_the_whole_default_budget():
    """A row at a time in turn: 1,024 rows of 60 pages, no two of one slot taken together."""
    with make(num_slots=128, budget_bytes=4 << 30) as cache:
        slots = [cache.alloc() for _ in range(128)]
        row_tokens = cache.page_bytes // cache.token_bytes
        for rows in range(1, 9):
            cache.prepare(slots, [rows * row_tokens] * 128)
        assert cache.stats().mapped_bytes == 1024 * cache.row_bytes
        assert mapped_areas() <= 128 * 60
        cache.check_integrity()


def test_pages_taken_back_and_given_to_others_merge_too():
    with make(num_slots=8, budget_bytes=64 * 60 * 4096, page_bytes=4096) as cache:
        slots = [cache.alloc() for _ in range(8)]
        for longest in (*slots, *slots):
            others = [slot for slot in slots if slot != longest]
            for tokens in range(5, 100, 5):
                cache.prepare([longest, *others], [tokens, *(min(tokens, 10) for _ in others)])
            assert mapped_areas() <= 8 * 60
            cache.free(longest)
            cache.claim(longest)
        cache.check_integrity()


@pytest.mark.skipif(not LIMIT.exists() or int(LIMIT.read_text()) > 70_000, reason="many areas are allowed")
def test_more_slots_than_areas_are_out_of_memory_until_some_are_freed():
    with make(num_slots=700, budget_bytes=700 * 60 * 4096, page_bytes=4096) as cache:
        slots = []
        with pytest.raises(OutOfMemoryError, match=f"vm.max_map_count = {LIMIT.read_text().strip()}") as caught:
            for _ in range(700):
                slots.append(cache.alloc())
                cache.prepare(slots[-1:], [1])
        assert caught.value.available == len(slots) - 1 > 400
        cache.check_integrity()
        for slot in slots[:20]:
            cache.free(slot)
        cache.prepare(slots[-1:], [1])
        cache.check_integrity()
