"""Decode attention over a contiguous strided cache, split along the tokens. Knows nothing of schedulers or pages.

All tiles of all sequences and heads stand in one line, and a fixed number of programs takes equal shares of it:

    sequence 0                | sequence 1            | ...    tiles of `tile` tokens, grouped by (sequence, kv head)
    h0: c t t t  h1: c t t t  | h0: c t t  h1: c t t  | ...    c: run_cost places, which hold no tile
    [program 0][program 1][program 2] ...                      each takes ceil(total / programs) places

A run is the tiles of one (sequence, head). What it takes to begin and to end one stands in the line too, since many
short runs would else be as large a share as one long run and take twice its time. A run that lies within one program is
written to the output at once. One cut by the border of a share is written in parts, at most two a program (the share's
first and last), and the program that is done with its part last joins them, in the order of the parts, so that results
do not depend on timing. The grid depends on the device and the number of sequences alone, and lengths are read on the
device: a captured graph serves any lengths.

Where sequences share their first tokens, these are attended before and apart (cascade.py): a run is then a sequence's
own tokens, and whoever writes its output joins the results of the shared ranges to it.

Where the step's keys and values are handed over too, the program that has a run's last tile rotates and stores them.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sarathi.model_executor.ops.triton.attention.cascade import CascadeWorkspace, attend_shared
from sarathi.model_executor.ops.triton.attention.decode_kernel import attention_kernel
from sarathi.model_executor.ops.types import DecodeBatch, NewTokens, RopeTable

_LOG2_E = 1.4426950408889634
# Said so that ptxas does not spill a few registers to let a third program fit on a multiprocessor where the grid has
# two for it: kernels compiled so took 1.3 times as long, as if programs launched early crowded on some of them.
_MOST_REGISTERS = 255
_PADDED_GROUP = 16  # query heads of one kv head, padded to the short side of the tensor cores' instruction


class DecodeConfig(NamedTuple):
    """Shape of the work; the defaults, for many sequences, are those of an H200."""

    tile: int = 64  # tokens read at a time
    programs_per_sm: int = 2
    warps: int = 4
    stages: int = 3
    ahead: int = 0  # tokens that a program asks for before the kernel in front has ended, where launches overlap
    run_cost: int = 3  # tiles that could be read in the time that it takes to begin and to end a run
    parts: int = 8  # of a run, that are read at a time when they are joined


_FEW_SEQS = 16
_FOR_FEW = DecodeConfig(
    tile=128, programs_per_sm=1, warps=8, ahead=128, run_cost=2, parts=12
)  # fewer programs leave fewer parts to join
_LARGEST_HEAD_FOR_FEW = 128  # what shared memory holds of such tiles


def config_for(num_seqs: int, head_size: int) -> DecodeConfig:
    """What was fastest on an H200 for so many sequences."""
    is_for_few = num_seqs <= _FEW_SEQS and head_size <= _LARGEST_HEAD_FOR_FEW
    return _FOR_FEW if is_for_few else DecodeConfig()


class DecodeWorkspace(NamedTuple):
    """Where parts of a run wait to be joined. One serves all layers, and all graphs on one stream."""

    parts: Tensor  # [programs, 2, _PADDED_GROUP, head_size] float32, not divided by their sums
    peaks: Tensor  # [programs, 2, _PADDED_GROUP] float32, largest score in units of log2
    sums: Tensor  # [programs, 2, _PADDED_GROUP] float32
    arrivals: Tensor  # [programs] int32: parts done of the run that is cut by the program's end; 0 between launches
    num_sms: int
    config: DecodeConfig | None  # None: by the number of sequences
    cascade: CascadeWorkspace | None = None  # None: every sequence reads all of its tokens itself

    @classmethod
    def create(
        cls, num_sms: int, head_size: int, device: torch.device, config: DecodeConfig | None = None
    ) -> "DecodeWorkspace":
        """Scratch for a device of `num_sms` multiprocessors: about 4 MiB for an H200 and head size 128."""
        programs_per_sm = (config or DecodeConfig()).programs_per_sm  # the most that config_for asks for
        shape = (num_sms * programs_per_sm, 2, _PADDED_GROUP)
        parts = torch.empty((*shape, head_size), dtype=torch.float32, device=device)
        peaks, sums = torch.empty((2, *shape), dtype=torch.float32, device=device)
        arrivals = torch.zeros(shape[0], dtype=torch.int32, device=device)
        return cls(parts, peaks, sums, arrivals, num_sms, config)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: DecodeBatch,
    scale: float,
    workspace: DecodeWorkspace,
    new: NewTokens | None = None,
    out: Tensor | None = None,
    *,
    pdl: bool = False,
) -> Tensor:
    """See ``native.decode_attention``. Any slot, token and head strides; at most 16 query heads to a kv head.

    head_size: a power of two. new: None where q is rotated and the cache holds the step's keys and values already.
    What the batch's cascade says is used where the workspace has room for it, and the batch no window.
    Returns a contiguous tensor like q: `out` where it is given.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_seqs, heads, head_size = q.shape
    if num_seqs == 0:
        return out
    config, kv_heads = workspace.config or config_for(num_seqs, head_size), keys.shape[2]
    fresh = new or NewTokens(q, q, RopeTable(q, q))
    cascade = workspace.cascade if batch.cascade is not None and batch.window is None else None
    shared, rows = (batch.slots, workspace.parts, workspace.sums), _PADDED_GROUP  # not read
    if cascade is not None:
        rows = cascade.config.rows
        shared = attend_shared(q, keys, values, batch, scale * _LOG2_E, cascade, new, pdl=pdl)
    attention_kernel[(workspace.num_sms * config.programs_per_sm,)](
        *(q, keys, values, batch.slots, batch.lengths, out, *workspace[:4], *shared, scale * _LOG2_E, num_seqs, rows),
        *(fresh.keys, fresh.values, *fresh.table),
        *(
            *q.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            *fresh.keys.stride()[:2],
            *fresh.values.stride()[:2],
        ),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        PADDED=_PADDED_GROUP,
        MEMBERS=triton.next_power_of_2(heads // kv_heads),
        PARTS=config.parts,
        HEAD_SIZE=head_size,
        TILE=config.tile,
        SEQS=_padded(num_seqs),
        WINDOW=batch.window or 0,
        AHEAD=config.ahead,
        RUN_COST=config.run_cost,
        CASCADE=cascade is not None,
        NEW=new is not None,
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=_MOST_REGISTERS,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


def distinct_sizes(fewest: int, most: int, head_size: int) -> list[int]:
    """Numbers of sequences from fewest to most, one for each kernel that they are compiled to."""
    sizes = {(config_for(size, head_size), _padded(size)): size for size in range(fewest, most + 1)}
    return list(sizes.values())


def _padded(num_seqs: int) -> int:
    """16, 64, 256, ...: few enough sizes that a ladder of batch sizes shares its compiled kernels."""
    padded = 16
    while padded < num_seqs:
        padded *= 4
    return padded
