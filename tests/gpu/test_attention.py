"""Every attention backend installed here against float64 attention: mixed batches, strides, borders, graphs."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from attention_calls import store_and_attend
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk
from sarathi.model_executor.architecture import ModelArchitecture, Rope
from sarathi.model_executor.attention.address import Address, BlockAddress, CacheLayer, SlotAddress
from sarathi.model_executor.attention.base import AttentionBackend, KernelUnavailableError, create_backend
from sarathi.model_executor.attention.flash_attn.fa3 import FlashAttention3
from sarathi.model_executor.attention.metadata import StaticStep
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.placement import Placement

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PLACE = Placement(torch.bfloat16, CUDA)
NAMES = (
    *("fa_vattn", "fa3_vattn", "fi_vattn", "sdpa_vattn", "fa2_vattn", "fa4_vattn"),
    *("fa_paged_16", "fa_paged_128", "fa_paged_256", "fi_paged_16", "fi_paged_64", "sdpa_paged_16"),
)
GRAPHED = ("fa_vattn", "fa3_vattn", "fa_paged_16", "fa_paged_256")
TOLERANCE = 1e-2


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.randrange(2**31)
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


def architecture(group: int = 4, kv_heads: int = 2, head_size: int = 128) -> ModelArchitecture:
    heads = group * kv_heads
    return ModelArchitecture("test", 1, 64, 64, heads, kv_heads, head_size, 100, 131072, 1e-5, Rope(1e4))


def backend_or_skip(name: str, arch: ModelArchitecture) -> AttentionBackend:
    try:
        return create_backend(BackendSpec.parse(name), arch, PLACE)
    except KernelUnavailableError as error:
        pytest.skip(str(error))


@dataclass
class Sequences:
    """Keys and values of several sequences, [length, kv_heads, head_size] each, and a cache that they will lie in."""

    keys: list[Tensor]
    values: list[Tensor]
    layer: CacheLayer
    address: Address

    @classmethod
    def create(
        cls, lengths: Sequence[int], arch: ModelArchitecture, block_size: int | None, window: int | None = None
    ) -> "Sequences":
        """The cache is one layer of a megacache of three, full of large finite numbers that no result may show."""
        draws = [[random_tensor(length, arch.num_kv_heads, arch.head_size) for length in lengths] for _ in range(2)]
        if block_size is None:
            rows, columns = len(lengths) + 2, -(-max(lengths) // 256) * 256 + 256
            address: Address = SlotAddress(tuple(random.sample(range(rows), len(lengths))))
        else:
            counts = [-(-length // block_size) for length in lengths]
            rows, columns = sum(counts) + 3, block_size
            order = iter(random.sample(range(rows), sum(counts)))
            address = BlockAddress(tuple([next(order) for _ in range(count)] for count in counts), block_size)
        shape = (rows, columns, 3, arch.num_kv_heads, arch.head_size)
        regions = [torch.full(shape, 1e4, dtype=torch.bfloat16, device=CUDA) for _ in range(2)]
        layer = CacheLayer(regions[0][:, :, 1], regions[1][:, :, 2], None)
        return cls(*draws, layer, address)

    def first(self, count: int) -> "Sequences":
        """Some of them, where they are."""
        address = self.address
        if isinstance(address, SlotAddress):
            address = SlotAddress(address.slots[:count])
        else:
            address = BlockAddress(address.block_tables[:count], address.block_size)
        return Sequences(self.keys[:count], self.values[:count], self.layer, address)

    def step(self, starts: Sequence[int], ends: Sequence[int]) -> tuple[Batch, Tensor, Tensor]:
        """The batch that computes tokens [start, end) of each sequence, and its keys and values."""
        chunks = tuple(Chunk(str(i), s, e - s, True, e, ()) for i, (s, e) in enumerate(zip(starts, ends, strict=True)))
        new = [torch.cat([x[s:e] for x, s, e in zip(xs, starts, ends, strict=True)]) for xs in (self.keys, self.values)]
        positions = torch.cat([torch.arange(s, e, device=CUDA) for s, e in zip(starts, ends, strict=True)])
        return Batch(chunks, positions, positions, None), *new

    def stored(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """What the cache holds of sequence `index`."""
        tokens = torch.arange(length, device=CUDA)
        if isinstance(self.address, SlotAddress):
            return tuple(x[self.address.slots[index], :length] for x in self.layer[:2])
        table = torch.tensor(self.address.block_tables[index], device=CUDA)
        size = self.address.block_size
        return tuple(x[table[tokens // size], tokens % size] for x in self.layer[:2])

    def expected(self, query: Tensor, starts: Sequence[int], ends: Sequence[int]) -> Tensor:
        """Float64 attention of the step's queries; long chunks are checked at 64 random queries (NaN elsewhere)."""
        out, offset = torch.full_like(query, float("nan"), dtype=torch.float64), 0
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            picked = torch.randperm(end - start, device=CUDA)[:64]
            keys, values = self.keys[index][:end], self.values[index][:end]
            out[offset + picked] = exact(query[offset + picked], keys, values, start + picked)
            offset += end - start
        return out


def exact(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """query: [n, heads, head_size] at these positions, over keys and values [length, kv_heads, head_size]."""
    hidden = torch.arange(len(keys), device=CUDA) > positions[:, None]
    grouped = query.double().unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("qhgd,khd->hgqk", grouped, keys.double()) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hgqk,khd->qhgd", weights, values.double()).flatten(1, 2)


def assert_near(out: Tensor, expected: Tensor) -> None:
    known = expected.isfinite()
    error = ((out.double() - expected)[known].norm() / expected[known].norm()).item()
    assert error < TOLERANCE, error


def run_steps(backend: AttentionBackend, sequences: Sequences, bounds: Sequence[Sequence[int]], heads: int) -> None:
    """One step from each row of bounds to the next, each checked; then the cache."""
    for starts, ends in pairwise(bounds):
        batch, key, value = sequences.step(starts, ends)
        query = random_tensor(len(key), heads, key.shape[-1])
        metadata = backend.plan(batch, sequences.address)
        out = store_and_attend(backend, query, key, value, sequences.layer, metadata)
        assert_near(out.view_as(query), sequences.expected(query, starts, ends))
    for index, length in enumerate(bounds[-1]):
        keys, values = sequences.stored(index, length)
        assert torch.equal(keys, sequences.keys[index][:length])
        assert torch.equal(values, sequences.values[index][:length])


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=CUDA)


def block_size_of(name: str) -> int | None:
    spec = BackendSpec.parse(name)
    return (spec.block_size or 16) if spec.is_paged else None


@pytest.mark.parametrize("name", NAMES)
def test_mixed_batches(name: str) -> None:
    arch = architecture()
    backend = backend_or_skip(name, arch)
    for _ in range(3):
        count = random.randint(1, 9)
        steps = [[0] * count]
        for _ in range(4):
            steps.append([length + random.choice((1, 1, 1, 15, 64, 300)) for length in steps[-1]])
        run_steps(backend, Sequences.create(steps[-1], arch, block_size_of(name)), steps, arch.num_heads)


@pytest.mark.parametrize("name", NAMES)
def test_decodes_then_one_chunk(name: str) -> None:
    arch = architecture()
    backend = backend_or_skip(name, arch)
    before = [random.randint(1, 3000) for _ in range(5)]
    after = [*(length + 1 for length in before[:-1]), before[-1] + 512]
    run_steps(backend, Sequences.create(after, arch, block_size_of(name)), [[0] * 5, before, after], arch.num_heads)


@pytest.mark.parametrize("decodes", [0, 3, 150])
@pytest.mark.parametrize("name", NAMES)
def test_one_long_chunk(name: str, decodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = architecture(random.choice((1, 4)), kv_heads=8)
    backend = backend_or_skip(name, arch)
    singles: list[Tensor] = []
    attend = FlashAttention3._attend_single
    monkeypatch.setattr(
        FlashAttention3, "_attend_single", lambda self, *given: singles.append(given[0]) or attend(self, *given)
    )
    before = [*(random.randint(1, 600) for _ in range(decodes)), random.randint(2048, 5000)]
    after = [*(length + 1 for length in before[:-1]), before[-1] + random.randint(2048, 5000)]
    bounds = [[0] * len(before), before, after]
    run_steps(backend, Sequences.create(after, arch, block_size_of(name)), bounds, arch.num_heads)
    if name == "fa_vattn":
        assert len(singles) == {0: 2, 3: 0, 150: 1}[decodes]


@pytest.mark.parametrize("name", NAMES)
def test_many_decodes_then_chunks(name: str) -> None:
    arch = architecture(kv_heads=8)
    backend = backend_or_skip(name, arch)
    decodes, chunks = random.randint(128, 300), random.randint(1, 3)
    before = [random.randint(1, 400) for _ in range(decodes + chunks)]
    after = [*(length + 1 for length in before[:decodes]), *(length + 200 for length in before[decodes:])]
    bounds = [[0] * len(before), before, after]
    run_steps(backend, Sequences.create(after, arch, block_size_of(name)), bounds, arch.num_heads)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("name", ["fa_vattn", "fa3_vattn", "fi_vattn", "fa_paged_16", "fi_paged_16"])
def test_group_and_head_sizes(name: str, group: int, head_size: int) -> None:
    if name.startswith("fi") and (group, head_size) not in ((1, 64), (4, 128), (8, 128)):
        pytest.skip("each shape is a compilation of a minute")
    arch = architecture(group, random.choice((1, 2)), head_size)
    backend = backend_or_skip(name, arch)
    lengths = [random.randint(1, 700) for _ in range(3)]
    steps = [[0] * 3, lengths, [length + 1 for length in lengths], [length + 40 for length in lengths]]
    run_steps(backend, Sequences.create(steps[-1], arch, block_size_of(name)), steps, arch.num_heads)


@pytest.mark.parametrize("length", [16384, 70000])
@pytest.mark.parametrize("name", NAMES)
def test_long_sequences(name: str, length: int) -> None:
    if name.startswith("sdpa"):
        pytest.skip("the reference materializes masks")
    arch = architecture()
    backend = backend_or_skip(name, arch)
    steps = [[0, 0], [length - 700, 3], [length - 1, 4], [length, 5]]
    run_steps(backend, Sequences.create(steps[-1], arch, block_size_of(name)), steps, arch.num_heads)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_around_tile_and_block_borders(name: str) -> None:
    arch = architecture()
    backend = backend_or_skip(name, arch)
    borders = [16, 64, 128, 176, 256]
    steps = [[0] * 5, [border - 1 for border in borders], borders, [border + 1 for border in borders]]
    run_steps(backend, Sequences.create(steps[-1], arch, block_size_of(name)), steps, arch.num_heads)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_planned_while_the_one_before_waits_for_the_device(name: str) -> None:
    """What a plan travels through must not be filled again before the device has taken it."""
    arch = architecture()
    backend = backend_or_skip(name, arch)
    before = [random.randint(1, 3000) for _ in range(9)]
    after = [length + 1 for length in before]
    sequences = Sequences.create(after, arch, block_size_of(name))
    run_steps(backend, sequences, [[0] * 9, before], arch.num_heads)
    planned = []
    torch.cuda._sleep(10**8)
    for count in (4, 9):
        some, starts, ends = sequences.first(count), before[:count], after[:count]
        batch, key, value = some.step(starts, ends)
        query = random_tensor(count, arch.num_heads, arch.head_size)
        out = store_and_attend(backend, query, key, value, some.layer, backend.plan(batch, some.address))
        planned.append((out.view_as(query), query, starts, ends))
    for out, *step in planned:
        assert_near(out, sequences.expected(*step))


@pytest.mark.parametrize("name", GRAPHED)
def test_one_graph_decodes_batches_that_grow_and_shrink(name: str) -> None:
    arch, block_size = architecture(), block_size_of(name)
    backend = backend_or_skip(name, arch)
    lengths = [random.randint(1, 400) for _ in range(6)]
    sequences = Sequences.create([length + 5 for length in lengths], arch, block_size)
    run_steps(backend, sequences, [[0] * 6, lengths], arch.num_heads)
    blocks = -(-512 // block_size) if block_size else 0
    static = StaticStep(8, max_length=512, blocks=blocks, device=CUDA)
    query, key, value = (random_tensor(8, heads, 128) for heads in (arch.num_heads, 2, 2))
    out = query.clone()

    def work() -> None:
        metadata = backend.plan_static(static.step)
        out.copy_(store_and_attend(backend, query, key, value, sequences.layer, metadata).view_as(out))

    graph = capture(work)
    for step in range(5):
        present = random.sample(range(6), random.randint(1, 6)) if step else list(range(6))
        chunks = tuple(Chunk(str(i), lengths[i], 1, True, lengths[i] + 1, ()) for i in present)
        starts, ends = [lengths[i] for i in present], [lengths[i] + 1 for i in present]
        part = Sequences([sequences.keys[i] for i in present], [sequences.values[i] for i in present],
                         sequences.layer, pick(sequences.address, present))  # fmt: skip
        _, new_key, new_value = part.step(starts, ends)
        key[: len(present)], value[: len(present)] = new_key, new_value
        query.normal_()
        static.fill(chunks, part.address)
        graph.replay()
        assert_near(out[: len(present)], part.expected(query[: len(present)], starts, ends))
        for i in present:
            lengths[i] += 1
    for index, length in enumerate(lengths):
        assert torch.equal(sequences.stored(index, length)[0], sequences.keys[index][:length])


def pick(address: Address, present: Sequence[int]) -> Address:
    if isinstance(address, SlotAddress):
        return SlotAddress(tuple(address.slots[i] for i in present))
    return BlockAddress(tuple(address.block_tables[i] for i in present), address.block_size)


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Captured while every sequence is padding: nothing is read and nothing stored."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
