"""The cache on a real GPU: what torch kernels write through one slot is theirs alone, while memory comes and goes."""

import random
import subprocess
import sys

import pytest
import torch

import vattention
from vattention import Arena, NoFreeSlotError, OutOfMemoryError, VirtualKVCache
from vattention.arguments import open_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20


def make(rows: int = 64, **changes) -> VirtualKVCache:
    """Two layers, 4 KiB a token in a region: a page of 2 MiB holds 512 tokens, a slot 8192 tokens in 16 rows."""
    options = {
        "num_layers": 2,
        "num_kv_heads": 16,
        "head_size": 128,
        "num_slots": 6,
        "max_tokens": 8192,
        "dtype": torch.bfloat16,
        "device": "cuda",
    }
    options = {**options, **changes}
    regions = 2 if options.get("megacache") else 2 * options["num_layers"]
    page_bytes = options.get("page_bytes") or open_device("cuda").granularity
    return VirtualKVCache(**options, budget_bytes=rows * regions * page_bytes)


def used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_granularity_is_probed_and_the_page_must_be_a_multiple():
    with make() as cache:
        assert cache.page_bytes % 65536 == 0
        granularity = cache.page_bytes
    with make(page_bytes=4 * granularity) as cache:
        assert cache.page_bytes == 4 * granularity
        slot = cache.alloc()
        cache.prepare([slot], [8192])
        cache.layer(1)[0][slot].fill_(1)
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match=f"multiple of the device's granularity of {granularity}.*65536"):
        make(page_bytes=65536)
    with pytest.raises(ValueError, match="smaller than one token"):
        make(head_size=1 << 20, page_bytes=granularity)


def test_devices_are_named_in_every_way_and_wrong_ones_refused():
    for device in ("cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)):
        with make(device=device) as cache:
            assert cache.layer(0)[0].device == torch.device("cuda", 0)
    with pytest.raises(vattention.DeviceError, match="no CUDA device 63"):
        make(device=63)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8], ids=str
)
@pytest.mark.parametrize("megacache", [False, True])
@pytest.mark.parametrize("heads, head_size", [(16, 128), (3, 20), (5, 576)])
def test_slots_and_layers_never_touch_each_other(megacache: bool, dtype: torch.dtype, heads: int, head_size: int):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng, generator = random.Random(seed), torch.Generator("cuda").manual_seed(seed)
    with make(200, megacache=megacache, dtype=dtype, num_kv_heads=heads, head_size=head_size) as cache:
        written: dict[tuple[int, int, int], torch.Tensor] = {}
        for _ in range(10):
            active = sorted({slot for slot, _, _ in written})
            if active and (rng.random() < 0.3 or len(active) == cache.num_slots):
                gone = rng.choice(active)
                torch.cuda.synchronize()
                cache.free(gone)
                written = {key: value for key, value in written.items() if key[0] != gone}
            tokens = rng.randint(1, 3000)
            slot = cache.alloc(tokens)
            cache.prepare([slot], [tokens])
            for layer in range(2):
                for side, tensor in enumerate(cache.layer(layer)):
                    view = tensor[slot, :tokens]
                    size = view.numel() * view.itemsize
                    data = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda", generator=generator)
                    view.copy_(data.view(dtype).view(view.shape))
                    written[slot, layer, side] = data
            cache.check_integrity()
            for (slot_, layer, side), data in written.items():
                length = data.numel() // (heads * head_size * dtype.itemsize)
                got = cache.layer(layer)[side][slot_, :length].contiguous().view(-1).view(torch.uint8)
                assert torch.equal(got, data)


def test_growth_and_reclaim_while_kernels_run():
    """Mapping neither waits for kernels nor disturbs them: a long queue writes one slot while others are edited."""
    with make(48) as cache:
        busy = cache.alloc(8192)
        cache.prepare([busy], [4096])
        k, v = cache.layer(1)
        matrix = torch.randn(4096, 4096, device="cuda")
        for round_ in range(20):
            for _ in range(10):
                matrix = torch.nn.functional.normalize(matrix @ matrix)
                k[busy, :4096].fill_(round_)
                v[busy, :4096].copy_(k[busy, :4096])
            other = cache.alloc(1 + round_ * 300)
            cache.prepare([other], [1 + round_ * 300])
            cache.prefetch([other, busy], [2 + round_ * 300, 4096 + round_])
            cache.free(other)  # no kernel was launched on it
            if round_ % 5 == 4:
                cache.reclaim_idle()
        torch.cuda.synchronize()
        assert v[busy, :4096].eq(19).all()
        cache.check_integrity()


def test_best_fit_reuse_maps_nothing():
    with make() as cache:
        slots = [cache.alloc() for _ in range(3)]
        cache.prepare(slots[1:], [2 * 512, 16 * 512])
        for slot in slots:
            cache.free(slot)
        assert cache.alloc(16 * 512) == slots[2]
        calls = cache.stats().calls
        cache.prepare([slots[2]], [16 * 512])
        cache.layer(0)[0][slots[2]].fill_(1)
        torch.cuda.synchronize()
        assert cache.stats().calls == calls


def test_pages_of_a_freed_slot_serve_a_shorter_request_where_memory_is_plentiful():
    """96 rows hold all 6 slots. The first request has one extent of 16 rows, of which the second needs 15."""
    with make(96) as cache:
        slot = cache.alloc(8192)
        cache.prepare([slot], [8192])
        cache.free(slot)
        calls = cache.stats().calls
        assert cache.alloc(15 * 512) == slot
        for tokens in range(15 * 512, 8193, 64):
            cache.prepare([slot], [tokens])
            cache.layer(1)[1][slot, :tokens].fill_(1)
        torch.cuda.synchronize()
        assert cache.stats().calls == calls
        cache.check_integrity()


def test_prefetch_makes_the_next_step_free():
    with make() as cache:
        slot = cache.alloc()
        cache.prepare([slot], [512])
        cache.prefetch([slot], [513])
        cache.wait()
        waited = cache.stats().prepares_waited
        cache.prepare([slot], [513])
        cache.layer(0)[1][slot, :513].fill_(1)
        torch.cuda.synchronize()
        assert cache.stats().prepares_waited == waited and cache.stats().worker_failures == 0


def test_shared_prefix_is_one_memory_and_survives_its_owner():
    with make() as cache:
        source, target = cache.alloc(), cache.alloc()
        cache.prepare([source], [3000])
        k, _ = cache.layer(1)
        numbers = torch.arange(3000, device="cuda", dtype=torch.bfloat16).view(-1, 1, 1)
        k[source, :3000] = numbers
        shared = cache.share(source, target, 3000)
        assert shared == 5 * 512
        assert cache.stats().mapped_bytes == 6 * cache.row_bytes
        cache.prepare([target], [3000])
        k[target, shared:3000] = -1
        assert k[source, :3000].eq(numbers).all()
        torch.cuda.synchronize()
        cache.free(source)
        fresh = cache.alloc(3000)
        cache.prepare([fresh], [3000])
        k[fresh, :3000] = 5
        assert k[target, :shared].eq(numbers[:shared]).all() and k[target, shared:3000].eq(-1).all()
        cache.check_integrity()


def test_a_share_that_ends_inside_an_extent_is_copied_there():
    """3,000 tokens at once are extents of 4, 1 and 1 pages of 512 tokens; 1,500 end inside of the first."""
    with make() as cache:
        source, target = cache.alloc(), cache.alloc()
        cache.prepare([source], [3000])
        numbers = torch.arange(3000, device="cuda", dtype=torch.float32).to(torch.bfloat16).view(-1, 1, 1)
        for layer in range(cache.num_layers):
            for sign, tensor in zip((1, -1), cache.view(source, layer), strict=True):
                tensor.copy_(sign * (numbers + layer))
        assert cache.share(source, target, 1500) == 1024
        assert cache.stats().mapped_bytes == 8 * cache.row_bytes
        for layer in range(cache.num_layers):
            for sign, tensor in zip((1, -1), cache.view(target, layer), strict=True):
                assert torch.equal(tensor, (sign * (numbers[:1024] + layer)).expand(1024, 16, 128))
        cache.prepare([target], [1500])
        cache.view(target, 0)[0][1024:] = -5
        assert torch.equal(cache.view(source, 0)[0], numbers.expand(3000, 16, 128))
        torch.cuda.synchronize()
        cache.free(source)
        cache.check_integrity()


FORKED = """
import os, torch
from vattention import ForkError, VirtualKVCache
cache = VirtualKVCache(num_layers=1, num_kv_heads=16, head_size=128, num_slots=2, max_tokens=8192,
                       dtype=torch.bfloat16, device="cuda", budget_bytes=1 << 30)
slot = cache.alloc()
cache.prepare([slot], [512])
k, _ = cache.view(slot, 0)
k.fill_(1)
torch.cuda.synchronize()
child = os.fork()
if child == 0:
    try:
        cache.alloc()
        os._exit(1)
    except ForkError:
        pass
    cache.close()
    del cache
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
cache.prepare([slot], [1024])
cache.view(slot, 0)[0][512:].fill_(2)
assert k.eq(1).all() and cache.view(slot, 0)[0][512:].eq(2).all()
cache.check_integrity()
print("parent is whole")
"""


def test_a_forked_process_leaves_its_parents_cache_alone():
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert run.stdout == "parent is whole\n", run.stdout + run.stderr


def test_exhaustion_leaves_everything_usable():
    with make(20) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.prepare([a], [8192])
        cache.layer(0)[0][a].fill_(3)
        with pytest.raises(OutOfMemoryError) as caught:
            cache.prepare([b], [5 * 512])
        assert (caught.value.needed, caught.value.available) == (21, 20)
        cache.prepare([b], [4 * 512])
        cache.layer(0)[0][b, :2048].fill_(4)
        assert cache.layer(0)[0][a].eq(3).all()
        for _ in range(4):
            cache.alloc()
        with pytest.raises(NoFreeSlotError):
            cache.alloc()


def test_a_budget_beyond_the_card_is_an_error_with_what_there_is():
    total = torch.cuda.mem_get_info()[1]
    rows = 2 * total // (64 * MIB)
    with make(rows, page_bytes=16 * MIB, max_tokens=1 << 20, num_slots=64) as cache:
        slots, before = [], used_bytes()
        with pytest.raises(OutOfMemoryError) as caught:
            for _ in range(64):
                slots.append(cache.alloc())
                cache.prepare([slots[-1]], [1 << 20])
        assert 0 < caught.value.available < rows
        assert used_bytes() - before >= cache.stats().mapped_bytes > total // 2
        cache.check_integrity()
        for slot in slots:
            cache.free(slot)
        cache.resize(caught.value.available * cache.row_bytes // 2)
        cache.prepare([cache.alloc()], [1000])


def test_resize_and_close_give_memory_back():
    torch.zeros(1, device="cuda").fill_(2).eq(2).all()  # the first kernels of a process take memory of their own
    before = used_bytes()
    cache = make(64)
    cache.fill_pool(64 * cache.row_bytes)
    full = used_bytes()
    assert full - before >= 64 * cache.row_bytes
    slot = cache.alloc()
    cache.prepare([slot], [8192])
    k, _ = cache.layer(0)
    k[slot].fill_(2)
    cache.resize(16 * cache.row_bytes)
    assert full - used_bytes() >= 48 * cache.row_bytes - 8 * MIB  # others on the device may move a little
    assert k[slot].eq(2).all()
    cache.close()
    assert used_bytes() - before < 32 * MIB
    assert cache.stats().created_bytes == 0 and k.shape == (6, 8192, 16, 128)


def test_decode_growth_loses_no_capacity_to_large_extents():
    with make(96, max_tokens=96 * 512, num_slots=4) as cache:
        big = cache.alloc(96 * 512)
        cache.prepare([big], [96 * 512])
        cache.free(big)
        slots = [cache.alloc() for _ in range(3)]
        for row in range(1, 33):
            cache.prepare(slots, [row * 512] * 3)
        for tensor in cache.tensors():
            tensor[slots, : 32 * 512] = 1
        torch.cuda.synchronize()
        with pytest.raises(OutOfMemoryError):
            cache.prepare(slots[:1], [33 * 512])
        cache.check_integrity()


def test_an_arena_gives_its_memory_back_and_keeps_its_addresses():
    arena = Arena(torch.cuda.mem_get_info()[1] * 2, "cuda")
    shapes = [(3000, 4096), (7,), (300 * MIB,), (4096, 11008)]
    tensors = [arena.empty(shape, torch.bfloat16) for shape in shapes]
    addresses, num_bytes = [each.data_ptr() for each in tensors], sum(each.numel() * 2 for each in tensors)
    torch.cuda.empty_cache()
    for number in range(4):
        before = used_bytes()
        arena.map()
        assert used_bytes() - before >= num_bytes - arena.page_bytes
        for index, tensor in enumerate(tensors):
            tensor.fill_(10 * number + index)
        assert all(each.eq(10 * number + index).all() for index, each in enumerate(tensors))
        arena.check_integrity()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        arena.release()
        if number:  # the first round loads kernels
            assert used_bytes() - before < 32 * MIB
        assert arena.created_bytes <= arena.page_bytes
    assert [each.data_ptr() for each in tensors] == addresses
    arena.empty((torch.cuda.mem_get_info()[1],), torch.int8)
    with pytest.raises(OutOfMemoryError):
        arena.map()
    assert not arena.is_mapped and arena.created_bytes <= arena.page_bytes
    arena.check_integrity()
    arena.close()


READ_UNMAPPED = """
import torch
from vattention import VirtualKVCache
cache = VirtualKVCache(num_layers=1, num_kv_heads=16, head_size=128, num_slots=2, max_tokens=8192,
                       dtype=torch.bfloat16, device="cuda", budget_bytes=1 << 30)
slot = cache.alloc()
cache.prepare([slot], [512])
k, _ = cache.layer(0)
k[slot, :512].fill_(1)
torch.cuda.synchronize()
print("mapped part is fine", flush=True)
k[slot, 512:513].sum().item()
"""


def test_reading_what_is_not_mapped_is_a_cuda_error():
    run = subprocess.run([sys.executable, "-c", READ_UNMAPPED], capture_output=True, text=True)
    assert "mapped part is fine" in run.stdout, run.stderr
    assert run.returncode != 0 and "illegal memory access" in run.stderr


def test_classic_functions():
    tensors = vattention.init_kvcache(2, 16, 128, 6, 8192, 0, torch.float16, 2 * MIB)
    assert len(tensors) == 4 and tensors[0].shape == (6, 8192, 16, 128)
    assert vattention.reserve_physical_pages(60 * 4 * 2 * MIB) == 240
    lengths = [0] * 6
    for slot_length in (700, 30, 4000):
        lengths[vattention.alloc_new_batch_idx(slot_length)] = slot_length
    for _ in range(20):
        vattention.step_async(lengths)
        for tensor in tensors:
            for slot, length in enumerate(lengths):
                tensor[slot, :length].fill_(slot + 1)
        lengths = [length + 100 if length else 0 for length in lengths]
    vattention.step(lengths, True)
    for tensor in tensors:
        assert all(tensor[slot, : length - 100].eq(slot + 1).all() for slot, length in enumerate(lengths) if length)
    assert vattention.num_free_kvblocks() == 60 - sum(-(-length // 512) for length in lengths)
    torch.cuda.synchronize()
    vattention.cleanup()
