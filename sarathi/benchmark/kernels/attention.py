"""Every attention kernel at hand for equal sequences on contiguous memory, as a function. Knows no engine."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sarathi.benchmark.kernels.shapes import Model
from sarathi.model_executor.attention.flash_attn.fa3 import PACKAGES, FlashAttention3
from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, VarlenStep, scheduled
from sarathi.model_executor.attention.metadata import SlotTokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [tokens, heads, head_size], keys, values -> as q


class Equal(NamedTuple):
    """Sequences of one length over a cache [batch, columns, kv_heads, head_size]."""

    batch: int
    cached: int  # tokens that are there before the step
    length: int  # and after it
    columns: int

    @property
    def new(self) -> int:
        """Tokens of each sequence that the step adds."""
        return self.length - self.cached


def installed_packages() -> list[str]:
    """The packages with FlashAttention 3 that can be imported here."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package.module.split(".")[0])]


def attention_at_hand(model: Model, shape: Equal) -> Iterator[Attend]:
    """Functions for the `new` tokens of each sequence, whose keys and values are stored already."""
    if not torch.cuda.is_available():
        yield _plain(shape)
        return
    for package in installed_packages():
        yield flash_attention(model, package, shape)
    if shape.new == 1:
        yield triton_decode(model, shape)


def flash_attention(model: Model, package: str, shape: Equal) -> Attend:
    """FlashAttention 3 of this package."""
    provider, new = FlashAttention3(package), shape.new
    params = AttentionParams(model.num_heads, model.num_kv_heads, model.head_size, torch.bfloat16, model.scale, None)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * new
    slots = torch.arange(shape.batch, dtype=torch.int32, device="cuda")
    lengths, only = torch.full_like(slots, shape.length), SlotTokens(0, shape.length) if shape.batch == 1 else None
    step = VarlenStep(starts, lengths, slots, None, new, shape.length, causal=new > 1, only=only)
    step = scheduled(step, provider, params, shape.columns)
    return lambda q, keys, values: provider.attend(q, (keys, values), step, params)


def triton_decode(model: Model, shape: Equal) -> Attend:
    """Our split-KV kernel."""
    from sarathi.model_executor.ops import overlaps_launches
    from sarathi.model_executor.ops.triton.decode_attention import DecodeWorkspace, decode_attention
    from sarathi.model_executor.ops.types import DecodeBatch

    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    device = torch.device("cuda")
    workspace, pdl = DecodeWorkspace.create(sms, model.head_size, device), overlaps_launches(device)
    slots = torch.arange(shape.batch, dtype=torch.int32, device="cuda")
    full = DecodeBatch(slots, torch.full_like(slots, shape.length))
    return lambda q, keys, values: decode_attention(q, keys, values, full, model.scale, workspace, pdl=pdl)


def _plain(shape: Equal) -> Attend:
    batch, cached, length, _ = shape
    mask = torch.ones(length - cached, length, dtype=torch.bool).tril(cached)

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries = q.unflatten(0, (batch, -1)).transpose(1, 2)
        keys, values = (x[:, :length].transpose(1, 2) for x in (keys, values))
        out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend
