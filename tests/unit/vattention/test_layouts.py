"""What is written through one slot is read back there and nowhere else, in every layout and data type."""

import random

import numpy as np
import pytest
import torch

from vattention import VirtualKVCache

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.complex64, torch.bool]
PAGE = 4096


def make(megacache: bool, dtype: torch.dtype = torch.float16, **changes) -> VirtualKVCache:
    options = {
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_size": 8,
        "num_slots": 5,
        "max_tokens": 700,
        "page_bytes": PAGE,
    }
    return VirtualKVCache(**{**options, **changes}, dtype=dtype, megacache=megacache, budget_bytes=16 << 20)


def write_random(view: torch.Tensor, seed: int) -> torch.Tensor:
    """Random bytes, so that NaNs of every kind are among them; returns the bytes written."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (view.numel() * view.itemsize,), dtype=torch.uint8, generator=generator)
    if view.dtype == torch.bool:
        data &= 1
    view.copy_(data.view(view.dtype).view(view.shape))
    return data


def read_bytes(view: torch.Tensor) -> torch.Tensor:
    return view.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("megacache", [False, True])
@pytest.mark.parametrize("heads, head_size", [(2, 8), (3, 20), (1, 37)])  # the last two: no token divides a page
def test_slots_and_layers_never_touch_each_other(megacache: bool, dtype: torch.dtype, heads: int, head_size: int):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with make(megacache, dtype, num_kv_heads=heads, head_size=head_size) as cache:
        written: dict[tuple[int, int, int], tuple[int, torch.Tensor]] = {}
        for step in range(6):
            active = sorted({slot for slot, _, _ in written})
            if active and (rng.random() < 0.3 or len(active) == cache.num_slots):
                gone = rng.choice(active)
                cache.free(gone)
                written = {key: value for key, value in written.items() if key[0] != gone}
            tokens = rng.randint(1, 300)
            slot = cache.alloc(tokens)
            cache.prepare([slot], [tokens])
            for layer in range(cache.num_layers):
                for side, tensor in enumerate(cache.layer(layer)):
                    data = write_random(tensor[slot, :tokens], seed + step)
                    written[slot, layer, side] = (tokens, data)
            cache.check_integrity()
            for (slot_, layer, side), (length, data) in written.items():
                assert torch.equal(read_bytes(cache.layer(layer)[side][slot_, :length]), data)


@pytest.mark.parametrize("megacache", [False, True])
def test_growth_keeps_what_was_written(megacache: bool):
    with make(megacache, head_size=37) as cache:
        slot, other = cache.alloc(), cache.alloc()
        k, _ = cache.layer(2)
        expected = []
        for tokens in range(1, 700, 13):
            cache.prepare([slot, other], [tokens, 700 - tokens])
            value = torch.randn(2, 37).half()
            k[slot, tokens - 1] = value
            k[other, 699 - tokens] = -value
            expected.append((tokens - 1, value))
        assert all(torch.equal(k[slot, at], value) for at, value in expected)


@pytest.mark.parametrize("megacache", [False, True])
def test_zeroing_one_slot_leaves_its_neighbours(megacache: bool):
    with make(megacache, head_size=37) as cache:
        slots = [cache.alloc() for _ in range(3)]
        cache.prepare(slots, [700] * 3)
        for tensor in cache.tensors():
            tensor[:3] = 1
            tensor[1].zero_()
        for layer in range(cache.num_layers):
            for tensor in cache.layer(layer):
                assert tensor[0].eq(1).all() and tensor[2].eq(1).all() and tensor[1].eq(0).all()


def test_a_reused_page_is_stale_so_only_prepared_tokens_may_be_read():
    with make(False) as cache:
        slot = cache.alloc(500)
        cache.prepare([slot], [500])
        k, _ = cache.layer(0)
        k[slot, :500] = float("nan")
        cache.free(slot)
        again = cache.alloc(500)
        assert again == slot
        cache.prepare([again], [100])
        k[again, :100] = 1
        assert k[again, :100].sum() == 100 * 2 * 8  # an attention kernel that reads past 100 would see NaN


def test_shapes_and_strides_per_layer():
    with make(False, head_size=37) as cache:
        assert cache.num_regions == 6 and cache.token_bytes == 2 * 37 * 2
        slot_stride = cache.rows_for(700) * PAGE // 2
        for tensor in cache.layer(1):
            assert tensor.shape == (5, 700, 2, 37) and tensor.stride() == (slot_stride, 74, 37, 1)
        assert [tuple(tensor.shape) for tensor in cache.tensors()] == [(5, 700, 2, 37)] * 6


def test_shapes_and_strides_megacache():
    with make(True) as cache:
        assert cache.num_regions == 2 and cache.token_bytes == 3 * 2 * 8 * 2
        k, v = cache.layer(2)
        assert k.shape == v.shape == (5, 700, 2, 8) and k.stride()[1:] == (48, 8, 1)
        assert [tuple(tensor.shape) for tensor in cache.tensors()] == [(5, 700, 3, 2, 8)] * 2


def test_megacache_wastes_less_of_a_page():
    prompts = [17, 40, 111]
    wasted = []
    for megacache in (False, True):
        with make(megacache) as cache:
            slots = [cache.alloc(tokens) for tokens in prompts]
            cache.prepare(slots, prompts)
            stats = cache.stats()
            own_bytes = sum(prompts) * 3 * 2 * 8 * 2 * 2
            assert stats.wasted_bytes == stats.mapped_bytes - own_bytes
            wasted.append(stats.wasted_bytes)
    assert wasted[1] < wasted[0]


def test_numpy_and_torch_write_the_same_memory_through_dlpack() -> None:
    """DLPack 1.0 alone says that NumPy may write; torch takes the older capsule."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    values = np.random.default_rng(seed).standard_normal((90, 2, 8)).astype(np.float16)
    with make(False) as cache:
        slot = cache.alloc(90)
        cache.prepare([slot], [90])
        region = cache.regions()[3]  # V of layer 0
        begin = slot * cache.slot_bytes
        array = np.from_dlpack(region)[begin : begin + 90 * cache.token_bytes].view(np.float16).reshape(90, 2, 8)
        array[:] = values
        assert torch.equal(cache.view(slot, 0)[1], torch.from_numpy(values))
        cache.view(slot, 0)[1].fill_(2)
        assert (array == 2).all()
        assert repr(region) == "Region(3 of a KV cache, uint8, cpu)"


def test_capsules_that_nobody_takes_keep_no_addresses() -> None:
    with make(False) as cache:
        for version in (None, (0, 8), (1, 0), (1, 3)):
            capsule = cache.regions()[0].__dlpack__(max_version=version)
            assert ("versioned" in repr(capsule)) == (version is not None and version[0] == 1)
            del capsule
        cache.check_integrity()
