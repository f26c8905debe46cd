"""Attention kernels for sequences of equal length, as functions of queries and a layer's cache."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sarathi.benchmark.kernels.shapes import Model
from sarathi.model_executor.attention.flash_attn.fa3 import PACKAGES, FlashAttention3
from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, VarlenStep, scheduled
from sarathi.model_executor.attention.metadata import SlotTokens

if TYPE_CHECKING:
    from sarathi.model_executor.ops.triton.attention.decode import DecodeConfig

Layer = tuple[Tensor, Tensor]  # keys and values, [slots or blocks, columns, kv_heads, head_size] each
Attend = Callable[[Tensor, Layer], Tensor]  # q [tokens, heads, head_size], cache -> as q


class Equal(NamedTuple):
    """Sequences of equal length. The keys and values of the new tokens are already in the cache."""

    batch: int
    new: int  # tokens of each sequence that the step adds
    length: int  # tokens of each sequence after it
    columns: int  # tokens of a slot or block


def installed_packages() -> list[str]:
    """Importable packages with FlashAttention 3."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package.module.split(".")[0])]


def available_attention(model: Model, shape: Equal) -> Iterator[Attend]:
    """All kernels that run on this machine, for sequence i in slot i."""
    if not torch.cuda.is_available():
        yield _sdpa(shape)
        return
    slots = torch.arange(shape.batch, dtype=torch.int32, device="cuda")
    for package in installed_packages():
        yield flash_attention(model, package, shape, slots, single=shape.batch == 1)
    if shape.new == 1:
        from sarathi.model_executor.ops import overlaps_launches

        yield triton_decode(model, shape, slots, pdl=overlaps_launches(torch.device("cuda")))


def flash_attention(
    model: Model, package: str, shape: Equal, slots: Tensor | None, block_table: Tensor | None = None,
    *, single: bool = False,
) -> Attend:  # fmt: skip
    """FlashAttention 3 from `package`, on `slots` or on the blocks of `block_table`.

    single: use the kernel for one sequence, in slot 0.
    """
    provider = FlashAttention3(package)
    params = AttentionParams(model.num_heads, model.num_kv_heads, model.head_size, torch.bfloat16, model.scale, None)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * shape.new
    lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32, device="cuda")
    only = SlotTokens(0, shape.length) if single else None
    step = VarlenStep(starts, lengths, slots, block_table, shape.new, shape.length, causal=shape.new > 1, only=only)
    step = scheduled(step, provider, params, shape.columns)
    return lambda q, layer: provider.attend(q, layer, step, params)


def triton_decode(
    model: Model, shape: Equal, slots: Tensor, config: "DecodeConfig | None" = None, *, pdl: bool = False
) -> Attend:
    """The split-KV decode kernel. config: tile sizes and warps; None: its default for the shape."""
    from sarathi.model_executor.ops.triton.attention.decode import DecodeWorkspace, decode_attention
    from sarathi.model_executor.ops.types import DecodeBatch

    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    workspace = DecodeWorkspace.create(sms, model.head_size, torch.device("cuda"), config)
    batch = DecodeBatch(slots, torch.full_like(slots, shape.length))
    return lambda q, layer: decode_attention(q, *layer, batch, model.scale, workspace, pdl=pdl)


def _sdpa(shape: Equal) -> Attend:
    mask = torch.ones(shape.new, shape.length, dtype=torch.bool).tril(shape.length - shape.new)

    def attend(q: Tensor, layer: Layer) -> Tensor:
        queries = q.unflatten(0, (shape.batch, -1)).transpose(1, 2)
        keys, values = (x[:, : shape.length].transpose(1, 2) for x in layer)
        out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend
