"""Arguments of operations beside activations: RoPE tables, places in the cache, placeholder tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class RotationTable(NamedTuple):
    """Rotation angles by position, for rotations that pair element i with element i + rotary_dim / 2."""

    cos: Tensor  # [max_positions, rotary_dim / 2], float32 or the model's dtype
    sin: Tensor  # [max_positions, rotary_dim / 2]


class CacheTarget(NamedTuple):
    """One layer of the cache and, for each token of the batch, the place of its key and value in it."""

    keys: Tensor  # [num_rows, row_tokens, kv_heads, head_size], any strides with the last one 1
    values: Tensor  # [num_rows, row_tokens, kv_heads, head_size]
    rows: Tensor  # [num_tokens] int32: slot or block; negative: the token is padding and is stored nowhere
    cols: Tensor  # [num_tokens] int32: token within the slot or block


class DecodeBatch(NamedTuple):
    """One query token for each of several sequences over contiguous slots."""

    slots: Tensor  # [num_seqs] int32: row of the cache
    lengths: Tensor  # [num_seqs] int32: tokens in the slot, the query's own included; 0: padding
    window: int | None = None  # how many tokens a query sees, its own included; None: all


class NewTokens(NamedTuple):
    """What a decode batch adds to the cache: the keys are not turned yet, and neither are the queries."""

    keys: Tensor  # [num_seqs, kv_heads, head_size], last stride 1
    values: Tensor  # [num_seqs, kv_heads, head_size], last stride 1
    table: RotationTable  # of the whole head: rotary_dim = head_size; a sequence's position is its length - 1


def placeholder_token(slot: int) -> int:
    """A negative token id for the last token of `slot`, which has been sampled but is known only on the device."""
    return -1 - slot


def resolve(token_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """token_ids, of any shape, with placeholders replaced by the tokens they stand for; last_tokens: [slots] int64."""
    slots = (-1 - token_ids).clamp_(min=0)
    return torch.where(token_ids < 0, last_tokens[slots].to(token_ids.dtype), token_ids)
