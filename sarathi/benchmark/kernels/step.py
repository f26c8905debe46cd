"""A whole decode step of a model from its kernels alone, in one CUDA graph: what an engine's step can come to.

Knows no engine: no scheduler, no pages, dense random weights, every sequence equally long.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.benchmark.kernels.inputs import random_tensor
from sarathi.benchmark.kernels.shapes import Model
from sarathi.benchmark.kernels.timing import graph_us
from sarathi.benchmark.records import Record, Table
from sarathi.model_executor.attention.flash_attn.fa3 import FlashAttention3
from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, VarlenStep, scheduled
from sarathi.model_executor.ops.triton.decode_attention import DecodeWorkspace, decode_attention
from sarathi.model_executor.ops.triton.ops import TritonOps
from sarathi.model_executor.ops.types import CacheTarget, DecodeBatch, RopeTable

_EPS = 1e-5
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, keys, values


class Layer(NamedTuple):
    """Weights and cache of one layer."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor
    keys: Tensor
    values: Tensor


class Step:
    """The weights of a model and the caches of `batch` sequences of `context` tokens."""

    def __init__(self, model: Model, batch: int, context: int, weights: "Step | None" = None) -> None:
        self.model, self.batch, self.context = model, batch, context
        cache = (batch, context, model.num_kv_heads, model.head_size)
        if weights is None:
            self.head, stacks = self._weights(model)
        else:
            self.head, stacks = weights.head, [layer[:5] for layer in weights.layers]
        self.layers = [Layer(*stack, random_tensor(*cache), random_tensor(*cache)) for stack in stacks]
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.slots = torch.arange(batch, dtype=torch.int32, device="cuda")
        self.positions = self.lengths - 1
        angles = torch.rand(context, model.head_size // 2, device="cuda")
        self.turns = RopeTable(angles.cos(), angles.sin())
        self.x = random_tensor(batch, model.hidden)

    def run(self, kernels: TritonOps, attend: Attend) -> Tensor:
        """From embedded tokens to the next ones, [batch]."""
        model, residual = self.model, self.x.clone()
        for layer in self.layers:
            normed = kernels.rms_norm(residual, layer.norm, _EPS)
            packed = kernels.linear(normed, layer.qkv).unflatten(1, (-1, model.head_size))
            q, k, v = packed.split((model.num_heads, model.num_kv_heads, model.num_kv_heads), dim=1)
            target = CacheTarget(layer.keys, layer.values, self.slots, self.positions)
            kernels.rope_and_store(q, k, v, self.positions, self.turns, target)
            kernels.linear_add(attend(q, layer.keys, layer.values).flatten(1), layer.o, residual)
            inner = kernels.gated_linear(kernels.rms_norm(residual, layer.norm, _EPS), layer.gate_up)
            kernels.linear_add(inner, layer.down, residual)
        return kernels.argmax(kernels.linear(kernels.rms_norm(residual, self.layers[0].norm, _EPS), self.head))

    def triton(self, *, pdl: bool) -> Attend:
        """Our split-KV kernel."""
        sms = torch.cuda.get_device_properties("cuda").multi_processor_count
        workspace = DecodeWorkspace.create(sms, self.model.head_size, torch.device("cuda"))
        batch = DecodeBatch(self.slots, self.lengths)
        return lambda q, keys, values: decode_attention(q, keys, values, batch, self.model.scale, workspace, pdl=pdl)

    def fa3(self) -> Attend:
        """FlashAttention 3 of the fa3-fwd package."""
        model, provider = self.model, FlashAttention3("fa3-fwd")
        params = AttentionParams(
            model.num_heads, model.num_kv_heads, model.head_size, torch.bfloat16, model.scale, None
        )
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device="cuda")
        step = VarlenStep(starts, self.lengths, self.slots, None, 1, self.context, causal=False)
        step = scheduled(step, provider, params, self.context)
        return lambda q, keys, values: provider.attend(q, (keys, values), step, params)

    @staticmethod
    def _weights(model: Model) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        shapes = model.weights
        head = random_tensor(*shapes["lm_head"]) * 0.02
        names = ("qkv", "o", "gate_up", "down")
        ones = torch.ones(model.hidden, dtype=torch.bfloat16, device="cuda")
        return head, [(*(random_tensor(*shapes[name]).mul_(0.02) for name in names), ones) for _ in range(model.layers)]


def measure_steps(table: Table, model: Model, shapes: list[tuple[int, int]]) -> None:
    """The step at each (batch, context) from cuBLAS and FlashAttention 3, and from our kernels."""
    step = None
    device = torch.device("cuda")
    for batch, context in shapes:
        step = Step(model, batch, context, step)
        variants = {
            "cublas, fa3": lambda s=step: (TritonOps(device, max_skinny_tokens=0), s.fa3()),
            "cublas, triton attention": lambda s=step: (TritonOps(device, max_skinny_tokens=0), s.triton(pdl=False)),
            "ours": lambda s=step: (TritonOps(device), s.triton(pdl=False)),
            "ours, overlapped launch": lambda s=step: (TritonOps(device, pdl=True), s.triton(pdl=True)),
            "cublas, triton, overlapped launch": lambda s=step: (
                TritonOps(device, max_skinny_tokens=0, pdl=True), s.triton(pdl=True)
            ),
        }  # fmt: skip
        rows, tokens = [], {}
        for name, make in variants.items():
            value = table.attempts.run(name, partial(_step_ms, step, make, name, tokens))
            if value is not None:
                rows.append(Record(model.name, "decode step", name, batch, context, value, "ms"))
        table.add_compared(rows, "fa3")
        first = next(iter(tokens.values()))
        same = {name: f"{(t == first).float().mean().item():.2f}" for name, t in tokens.items()}
        print(f"    share of tokens equal to the first's: {same}", flush=True)


def _step_ms(step: Step, make: Callable[[], tuple[TritonOps, Attend]], name: str, tokens: dict[str, Tensor]) -> float:
    kernels, attend = make()
    tokens[name] = step.run(kernels, attend)
    return graph_us(lambda _: step.run(kernels, attend), 1, min_launches=1) / 1000
