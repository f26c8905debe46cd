"""Arguments of operations other than activations: RoPE tables, places in the KV cache, placeholder tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class RopeTable(NamedTuple):
    """Cosines and sines by position; element i of a head is paired with element i + rotary_dim / 2."""

    cos: Tensor  # [positions, rotary_dim / 2], float32 or the model's dtype
    sin: Tensor  # [positions, rotary_dim / 2]


class CacheTarget(NamedTuple):
    """One layer of the cache and, for each token of the batch, the place of its key and value in it."""

    keys: Tensor  # [num_rows, row_tokens, kv_heads, head_size], any strides with the last one 1
    values: Tensor  # [num_rows, row_tokens, kv_heads, head_size]
    rows: Tensor  # [num_tokens] integers: slot or block; negative: the token is padding and is not stored
    cols: Tensor  # [num_tokens] integers: token within the slot or block


class Cascade(NamedTuple):
    """Tokens that sequences of a decode step share, in ranges that are read once for several queries; int32.

    A sequence shares some of its first tokens, but never all, or none. They are divided into consecutive ranges.
    """

    sequences: Tensor  # [num_seqs, 4]: tokens shared, first range, number of ranges, index among a range's members
    ranges: Tensor  # [most, 5]: slot, begin, end, first of its members in `members`, number of members; end 0: unused
    members: Tensor  # [num_seqs]: sequences, those of one range in a row


class CascadeShape(NamedTuple):
    """The number of ranges of a step, and their sizes."""

    ranges: int
    members: int  # the most of one range
    tile: int  # tokens: ranges have a multiple of it, except the last one of a prefix


class DecodeBatch(NamedTuple):
    """One query token for each of several sequences over contiguous slots."""

    slots: Tensor  # [num_seqs] int32
    lengths: Tensor  # [num_seqs] int32: tokens in the slot, the query's own included; 0: padding
    window: int | None = None  # tokens that a query attends to, its own included; None: all
    cascade: Cascade | None = None  # may divide the work; does not change the result


class NewTokens(NamedTuple):
    """Keys and values that a step adds to the cache. RoPE is not applied to the keys yet, nor to the queries."""

    keys: Tensor  # [num_tokens, kv_heads, head_size], last stride 1
    values: Tensor  # [num_tokens, kv_heads, head_size], last stride 1
    table: RopeTable


def placeholder_token(slot: int) -> int:
    """A negative token id for the last token of `slot`, which has been sampled but is known only on the device."""
    return -1 - slot


def resolve(token_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """token_ids, of any shape, with placeholders replaced by the tokens they stand for; last_tokens: [slots] int64."""
    slots = (-1 - token_ids).clamp_(min=0)
    return torch.where(token_ids < 0, last_tokens[slots].to(token_ids.dtype), token_ids)
