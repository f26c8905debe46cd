"""Steps on the device, views of slots, the choice of a library, and the backend over a fake FlashAttention."""

import random
from dataclasses import replace

import pytest
import torch
from attention_calls import store_and_attend
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk, PrefixGroup
from sarathi.model_executor.architecture import ModelArchitecture, Rope
from sarathi.model_executor.attention import slot_pages
from sarathi.model_executor.attention.address import Address, BlockAddress, CacheLayer, SlotAddress
from sarathi.model_executor.attention.base import KernelUnavailableError
from sarathi.model_executor.attention.cascade import as_cascade, cascade_size, plan_cascade
from sarathi.model_executor.attention.flash_attn import backend as flash_attention
from sarathi.model_executor.attention.flash_attn.backend import FlashAttentionBackend
from sarathi.model_executor.attention.flash_attn.choice import Candidate, Requirements, candidates, choose
from sarathi.model_executor.attention.flash_attn.fa3 import PACKAGES, FlashAttention3
from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, KernelCapabilities, VarlenStep
from sarathi.model_executor.attention.metadata import (
    DeviceStep,
    SlotTokens,
    StaticStep,
    first_decodes,
    make_step,
    rest_of,
    slot_mapping,
)
from sarathi.model_executor.attention.sdpa.backend import SdpaBackend
from sarathi.model_executor.attention.sdpa.view import Lengths, write_index
from sarathi.model_executor.attention.slot_pages import as_pages, one_slot, page_table
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops.native import NativeOps
from sarathi.model_executor.ops.types import CacheTarget, CascadeShape, NewTokens, RopeTable
from sarathi.model_executor.placement import Placement
from vattention import VirtualKVCache

CPU = torch.device("cpu")
PLACE = Placement(torch.float32, CPU)
ARCH = ModelArchitecture("tiny", 1, 32, 64, 4, 2, 8, 100, 200, 1e-5, Rope(1e4))
BLOCK = 4


@pytest.fixture(autouse=True, params=range(4))
def seed(request: pytest.FixtureRequest) -> int:
    value = random.randrange(2**31)
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


def random_batch(num_sequences: int, *, decodes: bool) -> Batch:
    """Chunks with random starts; token ids mean nothing here."""
    shapes = [(random.randint(0, 40), 1 if decodes else random.choice((1, 1, 3, 9, 17))) for _ in range(num_sequences)]
    chunks = tuple(Chunk(str(i), start, count, True, start + count, ()) for i, (start, count) in enumerate(shapes))
    total = sum(count for _, count in shapes)
    return Batch(chunks, torch.zeros(total, dtype=torch.int64), torch.zeros(total, dtype=torch.int64), None)


def mixed_batch(decodes: int, chunks: int) -> Batch:
    """Decodes, then chunks of 9 tokens."""
    shapes = [(random.randint(0, 40), 1) for _ in range(decodes)] + [(random.randint(0, 40), 9)] * chunks
    parts = tuple(Chunk(str(i), start, count, True, start + count, ()) for i, (start, count) in enumerate(shapes))
    total = sum(count for _, count in shapes)
    return Batch(parts, torch.zeros(total), torch.zeros(total), None)


def random_address(batch: Batch, *, paged: bool) -> Address:
    if not paged:
        return SlotAddress(tuple(random.sample(range(len(batch.chunks) + 2), len(batch.chunks))))
    counts = [-(-(chunk.start + chunk.num_tokens) // BLOCK) for chunk in batch.chunks]
    order = iter(random.sample(range(sum(counts)), sum(counts)))
    return BlockAddress(tuple([next(order) for _ in range(count)] for count in counts), BLOCK)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("decodes", [False, True])
def test_new_tokens_are_stored_where_the_reference_stores_them(paged: bool, decodes: bool) -> None:
    batch = random_batch(5, decodes=decodes)
    address = random_address(batch, paged=paged)
    lengths = [Lengths(chunk.num_tokens, chunk.start + chunk.num_tokens) for chunk in batch.chunks]
    rows, cols = slot_mapping(make_step(batch.chunks, address, CPU), BLOCK)
    expected_rows, expected_cols = write_index(lengths, address, CPU)
    assert (rows.tolist(), cols.tolist()) == (expected_rows.tolist(), expected_cols.tolist())


@pytest.mark.parametrize("paged", [False, True])
def test_tensors_are_aligned_for_any_number_of_sequences(paged: bool) -> None:
    """To 16 bytes: Triton compiles another variant of a kernel for other tensors."""
    for count in range(1, 10):
        batch = random_batch(count, decodes=True)
        step = make_step(batch.chunks, random_address(batch, paged=paged), CPU)
        places = step.block_table if paged else step.slots
        assert [each.data_ptr() % 16 for each in (step.starts, step.cached, step.lengths, places)] == [0] * 4


@pytest.mark.parametrize("decodes", [0, 5])
def test_the_host_knows_the_slot_and_length_of_a_steps_one_sequence(decodes: int) -> None:
    shapes = [*[(random.randint(0, 40), 1)] * decodes, (random.randint(0, 40), 9)]
    chunks = tuple(Chunk(str(i), start, count, True, start + count, ()) for i, (start, count) in enumerate(shapes))
    batch = Batch(chunks, torch.zeros(decodes + 9), torch.zeros(decodes + 9), None)
    slots = tuple(random.sample(range(9), decodes + 1))
    step = make_step(batch.chunks, SlotAddress(slots), PLACE.device)
    expected = (slots[-1], shapes[-1][0] + 9)
    assert step.only == (None if decodes else expected)
    assert rest_of(step, decodes).only == expected
    assert first_decodes(step, 1).only is None


def test_a_cascade_has_every_shared_token_once_for_each_member() -> None:
    shape = CascadeShape(random.randint(1, 40), random.randint(1, 9), random.choice((1, 16, 64)))
    numbers = random.sample(range(40), 40)
    groups, first = [], 0
    for size in (random.randint(2, 20), 2, random.randint(2, 9)):
        groups.append(PrefixGroup(random.choice((1, 64, 1000, 9000)), tuple(numbers[first : first + size])))
        first += size
    slots = random.sample(range(100), 40)
    plan = plan_cascade(groups, slots, 48, shape)
    assert len(plan) == cascade_size(48, shape) and len(plan) % 4 == 0
    found = as_cascade(torch.tensor(plan), 48, shape)
    taken = [group for group in groups if found.sequences[group.members[0], 0]]
    assert taken or all(-(-len(group.members) // shape.members) > shape.ranges for group in groups)
    for sequence, (tokens, begin, count, place) in enumerate(found.sequences.tolist()):
        group = next((group for group in taken if sequence in group.members), None)
        assert tokens == (group.num_tokens if group else 0) and bool(count) == bool(group)
        ends = [0]
        for slot, start, end, at, size in found.ranges[begin : begin + count].tolist():
            assert (slot, start) == (slots[group.members[0]], ends[-1]) and place < size <= shape.members
            assert found.members[at + place] == sequence
            assert end == tokens or not (end - start) % shape.tile
            ends.append(end)
        assert ends[-1] == tokens


def test_a_cascade_divides_the_work_evenly() -> None:
    shape = CascadeShape(33, 16, 64)
    groups = [PrefixGroup(4096, tuple(range(256)))]
    ranges = as_cascade(torch.tensor(plan_cascade(groups, range(256), 256, shape)), 256, shape).ranges
    assert [(end - begin) for _, begin, end, *_ in ranges.tolist()] == [2048] * 32 + [0]
    groups = [PrefixGroup(32_768, tuple(range(first, first + 6))) for first in range(0, 48, 6)]
    ranges = as_cascade(torch.tensor(plan_cascade(groups, range(48), 48, shape)), 48, shape).ranges
    assert [(end - begin) for _, begin, end, *_ in ranges.tolist()] == [8192] * 32 + [0]


@pytest.mark.parametrize("paged", [False, True])
def test_a_static_step_is_refilled_and_padded(paged: bool) -> None:
    static = StaticStep(6, max_length=60, blocks=20 if paged else 0, device=CPU, extras=2)
    starts = static.step.starts
    for count in (6, 2, 4):
        batch = random_batch(count, decodes=True)
        address = random_address(batch, paged=paged)
        extras = torch.randint(-9, 9, (2, 6))
        static.fill(batch.chunks, address, extras.flatten().tolist())
        assert torch.equal(static.extras.long(), extras)
        fresh = make_step(batch.chunks, address, CPU)
        assert static.step.starts is starts
        assert static.step.starts.tolist() == [*range(count + 1), *[count] * (6 - count)]
        assert static.step.lengths.tolist() == [*fresh.lengths.tolist(), *[0] * (6 - count)]
        rows, cols = slot_mapping(static.step, BLOCK)
        fresh_rows, fresh_cols = slot_mapping(fresh, BLOCK)
        assert rows.tolist() == [*fresh_rows.tolist(), *[-1] * (6 - count)]
        assert cols[:count].tolist() == fresh_cols.tolist()


def test_pages_of_slots_contain_the_slots_tokens() -> None:
    layers, columns, page = random.randint(1, 3), random.choice((32, 64)), random.choice((4, 8, 16))
    region = torch.randn(5, columns + random.choice((0, 1, 16)), layers, 2, 8)
    cache = region[:, :columns, layers - 1]
    pages = as_pages(cache, page)
    slots = torch.tensor(random.sample(range(5), 3), dtype=torch.int32)
    table = page_table(slots, columns // page, pages)
    torch.testing.assert_close(pages.pages[table.long()].flatten(1, 2), cache[slots.long()])


@pytest.mark.parametrize("slack", [0, 3, 16])
def test_pages_extend_to_the_last_token_if_it_does_not_end_a_page(slack: int) -> None:
    page, columns = 8, 8 * random.randint(1, 4) + random.randint(1, 7)
    region = torch.randn(3, columns + slack, 2, 8)
    cache = region[:, :columns]
    pages = as_pages(cache, page)
    num_pages = -(-columns // page)
    table = page_table(torch.tensor([0, 1, 2], dtype=torch.int32), num_pages, pages)
    fits = slack >= num_pages * page - columns  # the last page of the last slot lies within the storage
    shown = table if fits else table[:-1]
    assert shown.max() < len(pages.pages)
    torch.testing.assert_close(pages.pages[shown.long()].flatten(1, 2)[:, :columns], cache[: len(shown)])


FAKE = KernelCapabilities(frozenset({torch.float32}), 256, frozenset({9}), window=True, over_read_tokens=0)


class FakeLibrary:
    """FlashAttention in a few lines of float64, which checks its arguments against its capabilities."""

    name = "fake"

    def __init__(self, *, contiguous: bool, paged: bool) -> None:
        self.capabilities = KernelCapabilities(
            FAKE.dtypes, 256, FAKE.compute_capabilities, window=True, over_read_tokens=0,
            contiguous=contiguous, block_multiple=BLOCK if paged else None,
        )  # fmt: skip
        self.schedules = self.calls = 0

    def schedule(self, params: AttentionParams, step: VarlenStep, columns: int) -> Tensor:
        self.schedules += 1
        return torch.tensor([columns])

    def attend(
        self,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
        step: VarlenStep,
        params: AttentionParams,
        out: Tensor | None = None,
    ) -> Tensor:
        assert (step.slots is None) == (step.block_table is not None)
        assert step.schedule is not None and step.schedule.item() == cache[0].shape[1]
        self.calls += 1
        self._check_limits(cache, step)
        if step.only is not None:
            assert step.slots is not None and step.only == (step.slots.item(), step.lengths.item())
        out = torch.empty_like(q) if out is None else out
        for index, (start, end) in enumerate(zip(step.starts.tolist(), step.starts[1:].tolist(), strict=False)):
            length = step.lengths[index].item()
            places = self._locate(step, index, length, cache[0].shape[1])
            keys, values = (tensor[places].double() for tensor in cache)
            out[start:end] = self._attend(q[start:end].double(), keys, values, params).float()
        return out

    def _check_limits(self, cache: tuple[Tensor, Tensor], step: VarlenStep) -> None:
        if step.block_table is None:
            assert max(x.stride(dim) for x in cache for dim in range(3)) * 4 < slot_pages._MAX_STRIDE_BYTES
        else:
            assert step.block_table.max().item() < slot_pages._MAX_PAGES

    def _locate(self, step: VarlenStep, index: int, length: int, columns: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(length)
        if step.block_table is None:
            assert self.capabilities.contiguous and step.slots is not None
            return step.slots[index].long().expand(length), tokens
        return step.block_table[index].long()[tokens // columns], tokens % columns

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        queries, heads, _ = q.shape
        distance = torch.arange(len(keys)) - torch.arange(len(keys) - queries, len(keys))[:, None]
        hidden = (distance > 0) | (distance <= -(params.window or 10**9))
        keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * params.scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("paged", "contiguous"),
    [(False, True), (False, False), (True, True)],
)
def test_a_mixed_batch_equals_the_reference(paged: bool, contiguous: bool, window: int | None) -> None:
    batch = random_batch(4, decodes=random.random() < 0.3)
    address = random_address(batch, paged=paged)
    library = FakeLibrary(contiguous=contiguous, paged=paged or not contiguous)
    results = []
    rows = torch.randn(2, 60, BLOCK, 2, 8) if paged else torch.randn(2, 6, 128, 2, 8)
    query, key, value = random_tokens(batch.token_ids.shape[0])
    arch = replace(ARCH, sliding_window=window)
    for backend in (FlashAttentionBackend(library, arch, PLACE), SdpaBackend(arch, PLACE)):
        cache = rows.clone()
        layer = CacheLayer(cache[0], cache[1], window)
        metadata = backend.plan(batch, address)
        results.append((store_and_attend(backend, query, key, value, layer, metadata), cache))
        if isinstance(backend, FlashAttentionBackend):
            again = backend.attend(query, layer, metadata)
            torch.testing.assert_close(again, results[0][0])
            assert library.schedules <= 2
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many_decodes", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_slots_that_one_call_cannot_address_are_attended_one_by_one(
    contiguous: bool, many_decodes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same results as one call for all gives. Limits are lowered to just below what the cache takes."""
    caches, count = torch.randn(2, 6, 128, 2, 8), random.randint(2, 4)
    batch = mixed_batch(decodes=count, chunks=2) if many_decodes else random_batch(count, decodes=random.random() < 0.3)
    address = SlotAddress(tuple(random.sample(range(6), len(batch.chunks))))
    query, key, value = random_tokens(batch.token_ids.shape[0])
    decode = FakeDecode() if many_decodes else None
    monkeypatch.setattr(flash_attention, "_MANY_DECODES", 1)
    results = []
    for limited in (False, True):
        library, cache = FakeLibrary(contiguous=contiguous, paged=not contiguous), caches.clone()
        if limited:
            monkeypatch.setattr(slot_pages, "_MAX_STRIDE_BYTES", cache[0].stride(0) * 4)
            monkeypatch.setattr(slot_pages, "_MAX_PAGES", 5)
        backend, layer = FlashAttentionBackend(library, ARCH, PLACE, decode), CacheLayer(*cache, None)
        metadata = backend.plan(batch, address)
        results.append((store_and_attend(backend, query, key, value, layer, metadata), cache))
        assert library.calls == (1 if not limited else 2 if many_decodes else count)
        assert backend.can_capture(layer) == (many_decodes or not limited)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


LLAMA_TOKEN = 32 * 8 * 128  # elements of a token of Llama-3-8B in a region of a megacache


def layer_of(num_slots: int, max_tokens: int) -> Tensor:
    """One layer of the megacache of Llama-3-8B, without memory."""
    strides = (max_tokens * LLAMA_TOKEN, LLAMA_TOKEN, 128, 1)
    return torch.empty_strided((num_slots, max_tokens, 8, 128), strides, dtype=torch.bfloat16, device="meta")


def test_the_strides_of_a_tma_descriptor_are_below_two_to_the_40() -> None:
    """The slot stride counts, not the size of the region: 1,025 slots of 40,000 tokens take 2.7 TB."""
    assert slot_pages.has_tma_strides(layer_of(1025, 40000))
    assert slot_pages.has_tma_strides(layer_of(5, 2**24 - 1))
    assert not slot_pages.has_tma_strides(layer_of(5, 2**24))
    one = one_slot(layer_of(5, 2**24), 3)
    assert slot_pages.has_tma_strides(one) and one.shape == (1, 2**24, 8, 128)
    assert one.storage_offset() == 3 * 2**24 * LLAMA_TOKEN and one.stride()[1:] == (LLAMA_TOKEN, 128, 1)


@pytest.mark.parametrize("shape", [(1025, 40000), (5, 2**24)])
def test_a_long_chunk_alone_has_small_strides_in_any_region(shape: tuple[int, int]) -> None:
    library, given = object.__new__(FlashAttention3), {}
    library._run = lambda params, *, causal, **arguments: given.update(arguments) or (arguments["q"],)
    cache, slot, length = layer_of(*shape), random.randrange(shape[0]), random.randint(2048, 40000)
    params = AttentionParams(32, 8, 128, torch.bfloat16, 1.0, None)
    library._attend_single(
        torch.empty(2048, 32, 128, device="meta"), (cache, cache), SlotTokens(slot, length), params, None
    )
    for tensor in (given["k"], given["v"]):
        assert tensor.shape == (1, length, 8, 128) and tensor.storage_offset() == slot * cache.stride(0)
        assert max(tensor.stride()) * 2 < 2**40 and tensor.stride()[1:] == cache.stride()[1:]


@pytest.mark.parametrize("blocks", [None, 5])
def test_work_is_divided_for_as_many_tokens_as_a_slot_or_a_block_table_holds(blocks: int | None) -> None:
    library, given = object.__new__(FlashAttention3), {}
    library._has_single, library._schedule_defaults = True, {"num_splits": 0}
    library._schedule = lambda **arguments: given.update(arguments)
    slots, table = (torch.zeros(3), None) if blocks is None else (None, torch.zeros(3, blocks))
    step = VarlenStep(torch.arange(4), torch.ones(3), slots, table, max_new=1, max_length=9, causal=False)
    library.schedule(AttentionParams(32, 8, 128, torch.bfloat16, 1.0, None), step, columns=16)
    assert (given["max_seqlen_k"], given["page_size"]) == ((16, None) if blocks is None else (80, 16))


@pytest.mark.parametrize("name", ["sdpa", "contiguous", "pages"])
def test_slots_at_both_ends_of_a_region_of_terabytes(name: str) -> None:
    batch, count = mixed_batch(decodes=2, chunks=2), 4
    arch = replace(ARCH, num_layers=2)
    with VirtualKVCache(
        num_layers=2, num_kv_heads=2, head_size=8, num_slots=1025, max_tokens=2**23, dtype=torch.float32,
        megacache=True, budget_bytes=2**24,
    ) as cache:  # fmt: skip
        slots = random.sample((0, 1, 1023, 1024), count)
        for slot in slots:
            cache.claim(slot)
        cache.prepare(slots, [60] * count)
        layer = CacheLayer(*cache.layer(1), None)
        small = CacheLayer(torch.randn(count, 128, 2, 8), torch.randn(count, 128, 2, 8), None)
        for index, slot in enumerate(slots):
            layer.k[slot, :60], layer.v[slot, :60] = small.k[index, :60], small.v[index, :60]
        library = FakeLibrary(contiguous=name == "contiguous", paged=name == "pages")
        backend = SdpaBackend(arch, PLACE) if name == "sdpa" else FlashAttentionBackend(library, arch, PLACE)
        tokens, reference = random_tokens(batch.token_ids.shape[0]), SdpaBackend(arch, PLACE)
        expected = store_and_attend(reference, *tokens, small, reference.plan(batch, SlotAddress(tuple(range(count)))))
        found = store_and_attend(backend, *tokens, layer, backend.plan(batch, SlotAddress(tuple(slots))))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for index, slot in enumerate(slots):
            assert torch.equal(layer.k[slot, :60], small.k[index, :60])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "fake"])
def test_new_tokens_are_rotated_stored_and_attended_to(name: str, packed: bool) -> None:
    """Queries and keys are parts of one product, or tensors of their own (where each head is normalised)."""
    batch, library = random_batch(4, decodes=random.random() < 0.5), FakeLibrary(contiguous=True, paged=False)
    address, count = random_address(batch, paged=False), batch.token_ids.shape[0]
    backend = SdpaBackend(ARCH, PLACE) if name == "sdpa" else FlashAttentionBackend(library, ARCH, PLACE)
    positions = torch.cat([torch.arange(c.start, c.start + c.num_tokens) for c in batch.chunks])
    angles = torch.outer(torch.arange(200.0), torch.rand(4))
    table = RopeTable(angles.cos(), angles.sin())
    query, key, value = torch.randn(count, 8, 8).split((4, 2, 2), dim=1)
    if not packed:
        query, key = query.contiguous(), key.contiguous()
    caches = torch.randn(2, 6, 128, 2, 8)
    expected_caches, rotated, rotated_key = caches.clone(), query.clone(), key.clone()
    rows, cols = slot_mapping(make_step(batch.chunks, address, CPU), 128)
    NativeOps().rope_and_store(rotated, rotated_key, value, positions, table, CacheTarget(*expected_caches, rows, cols))
    metadata, layer = backend.plan(batch, address), CacheLayer(*caches, None)
    found = backend.append_and_attend(query, NewTokens(key, value, table), positions, layer, metadata)
    torch.testing.assert_close(caches, expected_caches)
    torch.testing.assert_close(query, rotated)
    reference = SdpaBackend(ARCH, PLACE)
    torch.testing.assert_close(found, reference.attend(rotated, layer, reference.plan(batch, address)))


class FakeDecode:
    """Our decode kernel in a few lines, which counts its decodes."""

    def __init__(self) -> None:
        self.decodes = 0

    def attend(self, query: Tensor, layer: CacheLayer, step: DeviceStep, out: Tensor | None = None) -> Tensor:
        assert step.is_decode and step.slots is not None and step.starts.tolist() == [*range(len(query) + 1)]
        self.decodes += len(query)
        chunks = tuple(Chunk("", length - 1, 1, True, length, ()) for length in step.lengths.tolist())
        backend = SdpaBackend(ARCH, PLACE)
        batch = Batch(chunks, torch.zeros(len(query)), torch.zeros(len(query)), None)
        # The reference stores before it attends: what lies there already.
        last = [(step.slots[i].long(), length - 1) for i, length in enumerate(step.lengths.tolist())]
        new = [torch.stack([x[place] for place in last]) for x in layer[:2]]
        found = store_and_attend(
            backend, query, *new, layer, backend.plan(batch, SlotAddress(tuple(step.slots.tolist())))
        )
        return found if out is None else out.copy_(found.view_as(out))


def test_many_decodes_before_chunks_are_a_call_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_MANY_DECODES", 3 * ARCH.num_kv_heads)  # from three decodes on
    for decodes, chunks in ((2, 2), (3, 1), (5, 2), (4, 0)):
        batch = mixed_batch(decodes, chunks)
        address = random_address(batch, paged=False)
        decode, library = FakeDecode(), FakeLibrary(contiguous=True, paged=False)
        query, key, value = random_tokens(batch.token_ids.shape[0])
        rows, results = torch.randn(2, 9, 64, 2, 8), []
        for backend in (FlashAttentionBackend(library, ARCH, PLACE, decode), SdpaBackend(ARCH, PLACE)):
            cache = rows.clone()
            layer = CacheLayer(cache[0], cache[1], None)
            out = store_and_attend(backend, query, key, value, layer, backend.plan(batch, address))
            results.append((out.view_as(query), cache))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
        assert decode.decodes == (decodes if decodes >= 3 else 0)


def random_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(count, 4, 8), torch.randn(count, 2, 8), torch.randn(count, 2, 8)


def missing() -> FakeLibrary:
    raise ImportError("No module named 'fake'")


def test_choice_takes_the_first_that_can_and_is_there() -> None:
    able = KernelCapabilities(FAKE.dtypes, 256, FAKE.compute_capabilities, True, True, 1, block_multiple=16)
    here = FakeLibrary(contiguous=True, paged=True)
    known = [
        Candidate("fa3", "unpaged", "pip install unpaged", FAKE, missing),
        Candidate("fa3", "absent", "pip install absent", able, missing),
        Candidate("fa2", "present", "pip install present", able, lambda: here),
    ]
    required = Requirements(torch.float32, 128, False, 16, 9)
    assert choose(BackendSpec.parse("fa_paged"), required, known) is here
    with pytest.raises(KernelUnavailableError, match=r"unpaged has no paged KV cache; .*pip install absent"):
        choose(BackendSpec.parse("fa3_paged"), required, known)


@pytest.mark.parametrize(
    ("required", "named"),
    [
        (Requirements(torch.float16, 128, False, None, 9), "float16"),
        (Requirements(torch.bfloat16, 128, True, None, 9), "sliding window"),
        (Requirements(torch.bfloat16, 128, False, 16, 9), "paged KV cache"),
        (Requirements(torch.bfloat16, 128, False, None, 8), "compute capability 8"),
        (Requirements(torch.bfloat16, 512, False, None, 9), "head size 512"),
    ],
)
def test_a_refusal_names_what_the_wheel_is_missing(required: Requirements, named: str) -> None:
    wheel = [c for c in candidates() if c.package == "fa3-fwd"]
    with pytest.raises(KernelUnavailableError, match=named):
        choose(BackendSpec.parse("fa3_vattn"), required, wheel)


def test_every_package_is_a_candidate() -> None:
    assert [c.package for c in candidates()] == [*PACKAGES, "flash-attn", "flash-attn-4"]
