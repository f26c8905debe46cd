"""Element-wise operations of a step in Triton and torch, compared with the memory bandwidth."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from sarathi.benchmark.kernels.shapes import Model, random_tensor
from sarathi.benchmark.kernels.timing import copies_for, graph_us
from sarathi.benchmark.records import Record, Table
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.ops.types import CacheTarget, RopeTable


class Work(NamedTuple):
    """One kernel at one shape."""

    name: str
    bytes_moved: int
    launch: Callable[[Ops, int], object]
    has_native: bool = True  # False: torch's waits for the device, which a CUDA graph cannot contain


def measure_elementwise(table: Table, model: Model, tokens: int, ours: Ops, native: Ops) -> None:
    """Measure each element-wise operation at `tokens` tokens, in both implementations."""
    copies = copies_for(tokens * model.hidden * 2)
    for work in _work(model, tokens, copies):
        rows = []
        for kind, kernels in (("torch", native), ("fused", ours)):
            if kind == "fused" or work.has_native:
                value = graph_us(lambda i, k=kernels, w=work: w.launch(k, i), copies)
                rows.append(Record(model.name, work.name, kind, tokens, 0, value, "us"))
        table.add_compared(rows, "torch")
        print(f"    floor at 4.5 TB/s {work.bytes_moved / 4.5e6:.2f} us", flush=True)


def _work(model: Model, tokens: int, copies: int) -> Iterator[Work]:
    yield _norm(model, tokens, copies)
    yield _rope(model, tokens, copies)
    gate_up = [random_tensor(tokens, 2 * model.intermediate) for _ in range(copies)]
    yield Work("silu_and_mul", tokens * model.intermediate * 6, lambda k, i: k.silu_and_mul(gate_up[i]))
    if tokens <= 256:
        yield from _sampling(model, tokens)


def _norm(model: Model, tokens: int, copies: int) -> Work:
    x = [random_tensor(tokens, model.hidden) for _ in range(copies)]
    weight = random_tensor(model.hidden)
    return Work("rms_norm", tokens * model.hidden * 4, lambda k, i: k.rms_norm(x[i], weight, 1e-5))


def _rope(model: Model, tokens: int, copies: int) -> Work:
    heads = model.num_heads + 2 * model.num_kv_heads
    packed = [random_tensor(tokens, heads, model.head_size) for _ in range(copies)]
    angles = torch.rand(tokens, model.head_size // 2, device="cuda")
    positions = torch.arange(tokens, device="cuda")
    keys, values = (random_tensor(2, tokens, model.num_kv_heads, model.head_size) for _ in range(2))
    rows = torch.ones(tokens, dtype=torch.int32, device="cuda")
    target = CacheTarget(keys, values, rows, positions.int())
    rope = RopeTable(angles.cos(), angles.sin())

    def launch(kernels: Ops, i: int) -> None:
        q, k, v = packed[i].split((model.num_heads, model.num_kv_heads, model.num_kv_heads), dim=1)
        kernels.rope_and_store(q, k, v, positions, rope, target)

    moved = tokens * model.head_size * 2 * (2 * model.num_heads + 5 * model.num_kv_heads)
    return Work("rope_and_store", moved, launch, has_native=False)


def _sampling(model: Model, rows: int) -> Iterator[Work]:
    moved, logits = rows * model.vocab * 4, [random_tensor(rows, model.vocab) for _ in range(2)]
    wide = [each.float() for each in logits]
    uniform = torch.rand(rows, 1, dtype=torch.float64, device="cuda")
    top_p = torch.full((rows, 1), 0.9, device="cuda")
    yield Work("argmax", moved // 2, lambda k, i: k.argmax(logits[i % 2]))
    yield Work("draw", moved, lambda k, i: k.draw(wide[i % 2], uniform))
    yield Work("top_p_threshold", moved, lambda k, i: k.top_p_threshold(wide[i % 2], top_p), has_native=False)
