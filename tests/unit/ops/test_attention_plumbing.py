"""Steps on the device, arithmetic pages, the choice of a provider, and the backend over a fake FlashAttention."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk
from sarathi.model_executor.architecture import ModelArchitecture, Rope
from sarathi.model_executor.attention.address import Address, BlockAddress, CacheLayer, SlotAddress
from sarathi.model_executor.attention.base import KernelUnavailableError
from sarathi.model_executor.attention.flash_attn import backend as flash_attention
from sarathi.model_executor.attention.flash_attn.backend import FlashAttentionBackend
from sarathi.model_executor.attention.flash_attn.choice import Candidate, Need, candidates, choose
from sarathi.model_executor.attention.flash_attn.fa3 import PACKAGES
from sarathi.model_executor.attention.flash_attn.provider import Abilities, Problem, VarlenStep
from sarathi.model_executor.attention.metadata import (
    DeviceStep,
    StaticStep,
    first_decodes,
    make_step,
    rest_of,
    token_places,
)
from sarathi.model_executor.attention.sdpa.backend import SdpaBackend
from sarathi.model_executor.attention.sdpa.view import Part, write_index
from sarathi.model_executor.attention.slot_pages import as_pages, page_table
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops.native.rope import rope_and_store
from sarathi.model_executor.ops.types import CacheTarget, NewTokens, RotationTable
from sarathi.model_executor.placement import Placement

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


def random_address(batch: Batch, *, paged: bool) -> Address:
    if not paged:
        return SlotAddress(tuple(random.sample(range(len(batch.chunks) + 2), len(batch.chunks))))
    counts = [-(-(chunk.start + chunk.num_tokens) // BLOCK) for chunk in batch.chunks]
    order = iter(random.sample(range(sum(counts)), sum(counts)))
    return BlockAddress(tuple([next(order) for _ in range(count)] for count in counts), BLOCK)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("decodes", [False, True])
def test_new_tokens_go_where_the_reference_writes_them(paged: bool, decodes: bool) -> None:
    batch = random_batch(5, decodes=decodes)
    address = random_address(batch, paged=paged)
    parts = [Part(chunk.num_tokens, chunk.start + chunk.num_tokens) for chunk in batch.chunks]
    rows, cols = token_places(make_step(batch, address, CPU), BLOCK)
    expected_rows, expected_cols = write_index(parts, address, CPU)
    assert (rows.tolist(), cols.tolist()) == (expected_rows.tolist(), expected_cols.tolist())


@pytest.mark.parametrize("paged", [False, True])
def test_whatever_the_number_of_sequences_tensors_begin_where_kernels_expect_it(paged: bool) -> None:
    """At 16 bytes: Triton would compile a kernel once more for others."""
    for count in range(1, 10):
        batch = random_batch(count, decodes=True)
        step = make_step(batch, random_address(batch, paged=paged), CPU)
        places = step.block_table if paged else step.rows
        assert [each.data_ptr() % 16 for each in (step.starts, step.cached, step.lengths, places)] == [0] * 4


@pytest.mark.parametrize("decodes", [0, 5])
def test_the_host_knows_where_a_steps_one_sequence_lies(decodes: int) -> None:
    shapes = [*[(random.randint(0, 40), 1)] * decodes, (random.randint(0, 40), 9)]
    chunks = tuple(Chunk(str(i), start, count, True, start + count, ()) for i, (start, count) in enumerate(shapes))
    batch = Batch(chunks, torch.zeros(decodes + 9), torch.zeros(decodes + 9), None)
    slots = tuple(random.sample(range(9), decodes + 1))
    step = make_step(batch, SlotAddress(slots), PLACE.device)
    home = (slots[-1], shapes[-1][0] + 9)
    assert step.only == (None if decodes else home)
    assert rest_of(step, decodes).only == home
    assert first_decodes(step, 1).only is None


@pytest.mark.parametrize("paged", [False, True])
def test_a_static_step_is_refilled_and_padded(paged: bool) -> None:
    static = StaticStep(6, max_length=60, blocks=20 if paged else 0, device=CPU, riders=2)
    starts = static.step.starts
    for count in (6, 2, 4):
        batch = random_batch(count, decodes=True)
        address = random_address(batch, paged=paged)
        riders = torch.randint(-9, 9, (2, 6))
        static.fill(batch, address, riders.flatten().tolist())
        assert torch.equal(static.riders.long(), riders)
        fresh = make_step(batch, address, CPU)
        assert static.step.starts is starts
        assert static.step.starts.tolist() == [*range(count + 1), *[count] * (6 - count)]
        assert static.step.lengths.tolist() == [*fresh.lengths.tolist(), *[0] * (6 - count)]
        rows, cols = token_places(static.step, BLOCK)
        fresh_rows, fresh_cols = token_places(fresh, BLOCK)
        assert rows.tolist() == [*fresh_rows.tolist(), *[-1] * (6 - count)]
        assert cols[:count].tolist() == fresh_cols.tolist()


def test_pages_of_slots_show_the_slots_tokens() -> None:
    layers, columns, page = random.randint(1, 3), random.choice((32, 64)), random.choice((4, 8, 16))
    region = torch.randn(5, columns + random.choice((0, 1, 16)), layers, 2, 8)
    cache = region[:, :columns, layers - 1]
    pages = as_pages(cache, page)
    slots = torch.tensor(random.sample(range(5), 3), dtype=torch.int32)
    table = page_table(slots, columns // page, pages)
    torch.testing.assert_close(pages.pages[table.long()].flatten(1, 2), cache[slots.long()])


@pytest.mark.parametrize("slack", [0, 3, 16])
def test_pages_reach_as_far_as_the_last_token_where_it_does_not_end_a_page(slack: int) -> None:
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


FAKE = Abilities(frozenset({torch.float32}), 256, frozenset({9}), window=True, over_read_tokens=0)


class FakeLibrary:
    """A FlashAttention in a few lines of float64, which checks that it is asked as it says it must be."""

    name = "fake"

    def __init__(self, *, contiguous: bool, paged: bool) -> None:
        self.abilities = Abilities(
            FAKE.dtypes, 256, FAKE.capabilities, window=True, over_read_tokens=0,
            contiguous=contiguous, block_multiple=BLOCK if paged else None,
        )  # fmt: skip
        self.schedules = 0

    def schedule(self, problem: Problem, step: VarlenStep, cache_cols: int) -> Tensor:
        self.schedules += 1
        return torch.tensor([cache_cols])

    def attend(
        self, q: Tensor, cache: tuple[Tensor, Tensor], step: VarlenStep, problem: Problem, out: Tensor | None = None
    ) -> Tensor:
        assert (step.rows is None) == (step.block_table is not None)
        assert step.schedule is not None and step.schedule.item() == cache[0].shape[1]
        if step.only is not None:
            assert step.rows is not None and step.only == (step.rows.item(), step.lengths.item())
        out = torch.empty_like(q) if out is None else out
        for index, (start, end) in enumerate(zip(step.starts.tolist(), step.starts[1:].tolist(), strict=False)):
            length = step.lengths[index].item()
            places = self._places(step, index, length, cache[0].shape[1])
            keys, values = (tensor[places].double() for tensor in cache)
            out[start:end] = self._attend(q[start:end].double(), keys, values, problem).float()
        return out

    def _places(self, step: VarlenStep, index: int, length: int, columns: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(length)
        if step.block_table is None:
            assert self.abilities.contiguous and step.rows is not None
            return step.rows[index].long().expand(length), tokens
        return step.block_table[index].long()[tokens // columns], tokens % columns

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, problem: Problem) -> Tensor:
        queries, heads, _ = q.shape
        distance = torch.arange(len(keys)) - torch.arange(len(keys) - queries, len(keys))[:, None]
        hidden = (distance > 0) | (distance <= -(problem.window or 10**9))
        keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * problem.scale
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
        results.append((backend.forward(query, key, value, layer, metadata), cache))
        if isinstance(backend, FlashAttentionBackend):
            again = backend.attend(query, layer, metadata)
            torch.testing.assert_close(again, results[0][0])
            assert library.schedules <= 2
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "fake"])
def test_new_tokens_are_rotated_stored_and_attended_to(name: str, packed: bool) -> None:
    """Queries and keys are parts of one product, or tensors of their own (where each head is normalised)."""
    batch, library = random_batch(4, decodes=random.random() < 0.5), FakeLibrary(contiguous=True, paged=False)
    address, count = random_address(batch, paged=False), batch.token_ids.shape[0]
    backend = SdpaBackend(ARCH, PLACE) if name == "sdpa" else FlashAttentionBackend(library, ARCH, PLACE)
    positions = torch.cat([torch.arange(c.start, c.start + c.num_tokens) for c in batch.chunks])
    angles = torch.outer(torch.arange(200.0), torch.rand(4))
    table = RotationTable(angles.cos(), angles.sin())
    query, key, value = torch.randn(count, 8, 8).split((4, 2, 2), dim=1)
    if not packed:
        query, key = query.contiguous(), key.contiguous()
    caches = torch.randn(2, 6, 128, 2, 8)
    expected_caches, rotated, rotated_key = caches.clone(), query.clone(), key.clone()
    rows, cols = token_places(make_step(batch, address, CPU), 128)
    rope_and_store(rotated, rotated_key, value, positions, table, CacheTarget(*expected_caches, rows, cols))
    metadata, layer = backend.plan(batch, address), CacheLayer(*caches, None)
    found = backend.append_and_attend(query, NewTokens(key, value, table), positions, layer, metadata)
    torch.testing.assert_close(caches, expected_caches)
    torch.testing.assert_close(query, rotated)
    reference = SdpaBackend(ARCH, PLACE)
    torch.testing.assert_close(found, reference.attend(rotated, layer, reference.plan(batch, address)))


class FakeDecode:
    """Our decode kernel in a few lines, which counts the decodes that it was asked for."""

    def __init__(self) -> None:
        self.decodes = 0

    def attend(self, query: Tensor, layer: CacheLayer, step: DeviceStep, out: Tensor | None = None) -> Tensor:
        assert step.one_each and step.rows is not None and step.starts.tolist() == [*range(len(query) + 1)]
        self.decodes += len(query)
        chunks = tuple(Chunk("", length - 1, 1, True, length, ()) for length in step.lengths.tolist())
        backend = SdpaBackend(ARCH, PLACE)
        batch = Batch(chunks, torch.zeros(len(query)), torch.zeros(len(query)), None)
        # The reference stores before it attends: what lies there already.
        last = [(step.rows[i].long(), length - 1) for i, length in enumerate(step.lengths.tolist())]
        new = [torch.stack([x[place] for place in last]) for x in layer[:2]]
        found = backend.forward(query, *new, layer, backend.plan(batch, SlotAddress(tuple(step.rows.tolist()))))
        return found if out is None else out.copy_(found.view_as(out))


def test_many_decodes_before_chunks_are_a_call_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_MANY_DECODES", 3 * ARCH.num_kv_heads)  # from three decodes on
    for decodes, chunks in ((2, 2), (3, 1), (5, 2), (4, 0)):
        shapes = [(random.randint(0, 40), 1) for _ in range(decodes)] + [(random.randint(0, 40), 9)] * chunks
        parts = tuple(Chunk(str(i), start, count, True, start + count, ()) for i, (start, count) in enumerate(shapes))
        total = sum(count for _, count in shapes)
        batch = Batch(parts, torch.zeros(total), torch.zeros(total), None)
        address = random_address(batch, paged=False)
        decode, library = FakeDecode(), FakeLibrary(contiguous=True, paged=False)
        query, key, value = random_tokens(total)
        rows, results = torch.randn(2, 9, 64, 2, 8), []
        for backend in (FlashAttentionBackend(library, ARCH, PLACE, decode), SdpaBackend(ARCH, PLACE)):
            cache = rows.clone()
            layer = CacheLayer(cache[0], cache[1], None)
            out = backend.forward(query, key, value, layer, backend.plan(batch, address))
            results.append((out.view_as(query), cache))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
        assert decode.decodes == (decodes if decodes >= 3 else 0)


def random_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(count, 4, 8), torch.randn(count, 2, 8), torch.randn(count, 2, 8)


def missing() -> FakeLibrary:
    raise ImportError("No module named 'fake'")


def test_choice_takes_the_first_that_can_and_is_there() -> None:
    able = Abilities(FAKE.dtypes, 256, FAKE.capabilities, True, True, 1, block_multiple=16)
    here = FakeLibrary(contiguous=True, paged=True)
    known = [
        Candidate("fa3", "unpaged", "pip install unpaged", FAKE, missing),
        Candidate("fa3", "absent", "pip install absent", able, missing),
        Candidate("fa2", "present", "pip install present", able, lambda: here),
    ]
    need = Need(torch.float32, 128, False, 16, 9)
    assert choose(BackendSpec.parse("fa_paged"), need, known) is here
    with pytest.raises(KernelUnavailableError, match=r"unpaged has no paged KV cache; .*pip install absent"):
        choose(BackendSpec.parse("fa3_paged"), need, known)


@pytest.mark.parametrize(
    ("need", "named"),
    [
        (Need(torch.float16, 128, False, None, 9), "float16"),
        (Need(torch.bfloat16, 128, True, None, 9), "sliding window"),
        (Need(torch.bfloat16, 128, False, 16, 9), "paged KV cache"),
        (Need(torch.bfloat16, 128, False, None, 8), "compute capability 8"),
        (Need(torch.bfloat16, 512, False, None, 9), "head size 512"),
    ],
)
def test_a_refusal_names_what_the_wheel_lacks(need: Need, named: str) -> None:
    wheel = [c for c in candidates() if c.package == "fa3-fwd"]
    with pytest.raises(KernelUnavailableError, match=named):
        choose(BackendSpec.parse("fa3_vattn"), need, wheel)


def test_every_package_is_a_candidate() -> None:
    assert [c.package for c in candidates()] == [*PACKAGES, "flash-attn", "flash-attn-4"]
