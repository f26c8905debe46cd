"""Cascade attention: ranges of tokens that sequences of a decode step share are read once for all their queries.

    slot of a member   | range 0 | range 1 | range 2 | own tokens ...    of each of the sequences
    queries            | --- of all members, in one tile --- |

A program attends one range and KV head for the queries of up to `rows` / group members, packed into the rows of a
product on tensor cores. Its results, [rows, head_size] and the logarithm of the sum of their weights, are joined with
those of a sequence's own tokens by the decode kernel, which runs next. The grid depends on the shape alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.ops.triton.attention.cascade_kernel import cascade_kernel
from sarathi.model_executor.ops.types import CascadeShape, DecodeBatch, NewTokens, RopeTable

_MOST_REGISTERS = 255


class CascadeConfig(NamedTuple):
    """Shape of the work of a program."""

    rows: int = 64  # queries: members x query heads of one KV head
    tile: int = 64  # tokens read at a time
    warps: int = 4
    stages: int = 3
    programs_per_sm: int = 2  # that the ranges of a step make, if it shares much
    fewest_ranges: int = 32  # of a step, where there are many KV heads


class CascadeWorkspace(NamedTuple):
    """Results of ranges, until they are joined. One serves all layers, and all graphs on one stream."""

    outputs: Tensor  # [ranges, kv_heads, rows, head_size] float32
    lse: Tensor  # [ranges, kv_heads, rows] float32, log2 of the sum of exp2(score)
    shape: CascadeShape
    config: CascadeConfig

    @classmethod
    def create(
        cls, num_sms: int, heads: tuple[int, int, int], device: torch.device, config: CascadeConfig | None = None
    ) -> "CascadeWorkspace":
        """heads: query heads, KV heads and head size. Scratch of about 9 MiB for Llama-3-8B on an H200."""
        config, (num_heads, kv_heads, head_size) = config or CascadeConfig(), heads
        ranges = max(config.fewest_ranges, num_sms * config.programs_per_sm // kv_heads)
        outputs = torch.empty((ranges, kv_heads, config.rows, head_size), dtype=torch.float32, device=device)
        lse = torch.empty(outputs.shape[:-1], dtype=torch.float32, device=device)
        return cls(outputs, lse, CascadeShape(ranges, config.rows * kv_heads // num_heads, config.tile), config)


def attend_shared(
    q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, scale: float, workspace: CascadeWorkspace,
    new: NewTokens | None, *, pdl: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The batch's sequences (see Cascade), outputs and lse of their ranges. scale: in units of log2."""
    cascade, config = batch.cascade, workspace.config
    assert cascade is not None
    ranges, kv_heads, rows, head_size = workspace.outputs.shape
    table = RopeTable(q, q) if new is None else new.table
    cascade_kernel[(ranges * kv_heads,)](
        *(q, keys, values, batch.lengths, cascade.ranges, cascade.members, workspace.outputs, workspace.lse, scale),
        *table,
        *(*q.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
        KV_HEADS=kv_heads,
        GROUP=q.shape[1] // kv_heads,
        HEAD_SIZE=head_size,
        ROWS=rows,
        TILE=config.tile,
        NEW=new is not None,
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=_MOST_REGISTERS,
        **({"launch_pdl": True} if pdl else {}),
    )
    return cascade.sequences, workspace.outputs, workspace.lse
