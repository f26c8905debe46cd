"""Decode attention of sequences that share a prefix: each reads it, or it is read once per group (cascade).

A group's slots map the same physical pages for the prefix, as in the engine.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.benchmark.kernels.shapes import Model, random_tensor
from sarathi.benchmark.kernels.timing import Launch, compare_us, graph_sample
from sarathi.benchmark.records import Record, Table
from sarathi.messages import Chunk, PrefixGroup
from sarathi.model_executor.attention.address import CacheLayer, SlotAddress
from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode
from sarathi.model_executor.attention.metadata import DeviceStep, make_step, with_cascade
from sarathi.model_executor.ops.triton.attention.cascade import CascadeConfig
from sarathi.model_executor.ops.triton.attention.decode import distinct_sizes
from vattention import VirtualKVCache

_LAYERS = 4  # over which a graph walks, so that L2 holds none of them
_DEVICE = torch.device("cuda")
_EACH = "triton, each reads all"  # what ratios are to
CONFIGS = [
    CascadeConfig(),
    CascadeConfig(rows=128, warps=8),
    CascadeConfig(rows=128, warps=8, programs_per_sm=1, fewest_ranges=16),
    CascadeConfig(rows=128, tile=128, warps=8, stages=2, programs_per_sm=1, fewest_ranges=16),
    CascadeConfig(stages=2),
    CascadeConfig(programs_per_sm=4),
    CascadeConfig(rows=32),
]


class Shared(NamedTuple):
    """Groups of sequences with a common prefix."""

    groups: int
    members: int  # of each group
    prefix: int  # tokens that they share
    own: int  # tokens of each behind them, the new one included

    @property
    def work(self) -> str:
        return f"decode, {self.groups} groups, {self.prefix} tokens shared"

    @property
    def sequences(self) -> int:
        return self.groups * self.members


class _Inputs(NamedTuple):
    query: Tensor  # [sequences, num_heads, head_size]
    layers: list[CacheLayer]
    step: DeviceStep
    address: SlotAddress
    groups: list[PrefixGroup]
    cache: VirtualKVCache  # owns the memory


def measure_shared(table: Table, model: Model, shared: Shared) -> None:
    """Measure every configuration of the cascade kernel; the reference reads the prefix for each sequence."""
    inputs = _inputs(model, shared)
    launches: dict[str, Callable[[], Launch]] = {_EACH: partial(_launch, model, inputs, None)}
    for config in CONFIGS:
        name = " ".join(f"{key}={value}" for key, value in config._asdict().items())
        launches[f"triton cascade {name}"] = partial(_launch, model, inputs, config)
    expected = _launch(model, inputs, None)(0).double()
    found = compare_us(table.attempts, launches.items(), expected, partial(graph_sample, copies=_LAYERS))
    length = shared.prefix + shared.own
    records = [Record(model.name, shared.work, name, shared.sequences, length, us, "us") for name, us in found.items()]
    table.add_compared(records, _EACH)
    once = model.kv_bytes(shared.groups, shared.prefix) + model.kv_bytes(shared.sequences, shared.own)
    print(f"    floor at 4.5 TB/s, read once {once / 4.5e6:.1f} us", flush=True)
    inputs.cache.close()


def _launch(model: Model, inputs: _Inputs, config: CascadeConfig | None) -> Launch:
    """config: None: every sequence reads all of its tokens."""
    decode, step = TritonDecode(model.head_size, _DEVICE, pdl=True), inputs.step
    if config is not None:
        decode.enable_cascade(model.num_heads, model.num_kv_heads, config)
        assert decode.cascade is not None
        step = with_cascade(step, inputs.groups, inputs.address.slots, len(inputs.query), decode.cascade)
    return lambda i: decode.attend(inputs.query, inputs.layers[i], step)


def _inputs(model: Model, shared: Shared) -> _Inputs:
    length = shared.prefix + shared.own
    token_bytes = model.kv_bytes(1, 1) * _LAYERS
    cache = VirtualKVCache(
        num_layers=_LAYERS, num_kv_heads=model.num_kv_heads, head_size=model.head_size, num_slots=shared.sequences,
        max_tokens=length + 64, dtype=torch.bfloat16, device="cuda", megacache=True, max_extent_rows=1,
        budget_bytes=(shared.groups * (length + 4096) + shared.sequences * (shared.own + 4096)) * token_bytes,
    )  # fmt: skip
    groups = [range(first, first + shared.members) for first in range(0, shared.sequences, shared.members)]
    for slots in groups:
        _fill(cache, slots, shared)
    chunks = [Chunk(str(slot), length - 1, 1, True, length) for slot in range(shared.sequences)]
    address = SlotAddress(tuple(range(shared.sequences)))
    layers = [CacheLayer(*cache.layer(index), None) for index in range(_LAYERS)]
    query = random_tensor(shared.sequences, model.num_heads, model.head_size)
    step = make_step(chunks, address, _DEVICE)
    return _Inputs(query, layers, step, address, [PrefixGroup(shared.prefix, tuple(each)) for each in groups], cache)


def _fill(cache: VirtualKVCache, slots: Sequence[int], shared: Shared) -> None:
    """Fill a group's slots with random tokens; the slots share the prefix's pages."""
    for slot in slots:
        cache.claim(slot)
        if slot != slots[0] and cache.share(slots[0], slot, shared.prefix) != shared.prefix:
            raise ValueError(f"{shared.prefix} shared tokens: it must be a multiple of a page's tokens")
        cache.prepare([slot], [shared.prefix + shared.own])
        first = shared.prefix if slot != slots[0] else 0
        for layer in range(_LAYERS):
            for tensor in cache.view(slot, layer):
                tensor[first:].normal_()


def warm_up_jobs(models: Sequence[Model], shapes: Sequence[Shared]) -> Iterator[Callable[[], object]]:
    """One thunk per kernel of these shapes."""
    counts = [shape.sequences for shape in shapes]
    for model, config in product(models, (None, *CONFIGS)):
        for size in distinct_sizes(min(counts), max(counts), model.head_size):
            yield partial(_compile, model, size, config)


def _compile(model: Model, size: int, config: CascadeConfig | None) -> None:
    keys, values = (random_tensor(1, 16, model.num_kv_heads, model.head_size) for _ in range(2))
    decode = TritonDecode(model.head_size, _DEVICE, pdl=True)
    if config is not None:
        decode.enable_cascade(model.num_heads, model.num_kv_heads, config)
    decode.warm_up(model.num_heads, CacheLayer(keys, values, None), size, size)
