"""Attention over ragged batches: decodes alone, and decodes mixed with prefill chunks."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.benchmark.kernels.shapes import Model, random_tensor
from sarathi.benchmark.kernels.timing import Launch, compare_us, copies_for, graph_sample
from sarathi.benchmark.records import Record, Table
from sarathi.benchmark.workload.lengths import chat_lengths
from sarathi.messages import Chunk
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer, SlotAddress
from sarathi.model_executor.attention.flash_attn.backend import FlashAttentionBackend, FlashMetadata
from sarathi.model_executor.attention.flash_attn.fa3 import FlashAttention3
from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode
from sarathi.model_executor.attention.metadata import make_step
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops.triton.attention.decode import DecodeConfig, config_for, distinct_sizes
from sarathi.model_executor.placement import Placement
from sarathi.model_executor.rope import Rope

_PACKAGE = "fa3-fwd"
_FA3 = f"fa3 contiguous ({_PACKAGE})"  # one call
_SEED = 0
_PLACE = Placement(torch.bfloat16, torch.device("cuda"))


class Mixed(NamedTuple):
    """A mixed batch: decodes with chat-like lengths, then prefill chunks."""

    decodes: int
    chunks: int
    tokens: int  # of each chunk

    @property
    def work(self) -> str:
        return f"{self.decodes} decodes, lengths as in chats, and {self.chunks} chunks of {self.tokens}"


class _Step(NamedTuple):
    query: Tensor  # [T, num_heads, head_size]
    layers: list[CacheLayer]  # as many as it takes to leave the cache
    batch: Batch
    address: SlotAddress
    mean_length: int  # of the decodes


def measure_chats(table: Table, model: Model, decodes: int) -> None:
    """Measure decodes: our kernel, the same without the cost per run, and FlashAttention 3, the reference."""
    step = _step(model, Mixed(decodes, 0, 0))
    shape = config_for(decodes, model.head_size)
    configs = {"triton": shape, "triton, run_cost=0": shape._replace(run_cost=0)}
    backends = {name: _backend(model, config) for name, config in configs.items()}
    launches = {_FA3: partial(_attend, _backend(model, None), step, in_two=False)}
    launches |= {name: partial(_attend, backend, step, in_two=False) for name, backend in backends.items()}
    _measure(table, "decode, lengths as in chats", model, step, launches)


def measure_mixed(table: Table, model: Model, mixed: Mixed) -> None:
    """Measure separate calls for decodes and chunks; the reference is a single call for all."""
    step = _step(model, mixed)
    launches = {
        _FA3: partial(_attend, _backend(model, None), step, in_two=False),
        "two calls": partial(_attend, _backend(model, config_for(mixed.decodes, model.head_size)), step, in_two=True),
    }
    _measure(table, mixed.work, model, step, launches)


def _measure(table: Table, work: str, model: Model, step: _Step, launches: Mapping[str, Callable[[], Launch]]) -> None:
    """The first launch is the reference for times and for results."""
    expected = next(iter(launches.values()))()(0).double()
    found = compare_us(table.attempts, launches.items(), expected, partial(graph_sample, copies=len(step.layers)))
    sequences, length = len(step.batch.chunks), step.mean_length
    table.add_compared(
        [Record(model.name, work, name, sequences, length, us, "us") for name, us in found.items()], _FA3
    )


def _attend(backend: FlashAttentionBackend, step: _Step, *, in_two: bool) -> Launch:
    made = make_step(step.batch.chunks, step.address, _PLACE.device)
    metadata = FlashMetadata(made, step.batch.chunks, step.address.slots)
    if in_two:
        metadata = metadata.divided(step.batch.leading_decodes)
    return lambda i: backend.attend(step.query, step.layers[i], metadata)


def _backend(model: Model, config: DecodeConfig | None) -> FlashAttentionBackend:
    """config: of our decode kernel; None: without it."""
    arch = ModelArchitecture(
        model.name, model.layers, model.hidden, model.intermediate, model.num_heads, model.num_kv_heads,
        model.head_size, model.vocab, 2**17, 1e-5, Rope(1e4),
    )  # fmt: skip
    decode = None if config is None else TritonDecode(model.head_size, _PLACE.device, pdl=True, config=config)
    return FlashAttentionBackend(FlashAttention3(_PACKAGE), arch, _PLACE, decode)


def _step(model: Model, mixed: Mixed) -> _Step:
    lengths = chat_lengths(mixed.decodes, _SEED)
    ends = [*lengths, *[mixed.tokens] * mixed.chunks]
    news = [*[1] * mixed.decodes, *[mixed.tokens] * mixed.chunks]
    chunks = [Chunk(str(i), end - new, new, True, end, ()) for i, (end, new) in enumerate(zip(ends, news, strict=True))]
    slots = random.Random(_SEED).sample(range(len(ends)), len(ends))
    none = torch.empty(0)
    shape = (len(ends), max(ends), model.num_kv_heads, model.head_size)
    copies = copies_for(model.kv_bytes(1, sum(ends)), limit=4)
    layers = [CacheLayer(random_tensor(*shape), random_tensor(*shape), None) for _ in range(copies)]
    query = random_tensor(sum(news), model.num_heads, model.head_size)
    mean = round(sum(lengths) / len(lengths))
    return _Step(query, layers, Batch(tuple(chunks), none, none, None), SlotAddress(tuple(slots)), mean)


def warm_up_jobs(models: Sequence[Model], decodes: Sequence[int]) -> Iterator[Callable[[], object]]:
    """One thunk per kernel of ours for these numbers of decodes."""
    for model in models:
        for count in distinct_sizes(min(decodes), max(decodes), model.head_size):
            shape = config_for(count, model.head_size)
            for config in (shape, shape._replace(run_cost=0)):
                yield partial(_compile, model, count, config)


def _compile(model: Model, decodes: int, config: DecodeConfig) -> None:
    keys, values = (random_tensor(1, 16, model.num_kv_heads, model.head_size) for _ in range(2))
    layer = CacheLayer(keys, values, None)
    decode = TritonDecode(model.head_size, _PLACE.device, pdl=True, config=config)
    decode.warm_up(model.num_heads, layer, decodes, decodes)
