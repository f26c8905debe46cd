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
    """What sequences of a decode step share, as ranges of tokens that are read once for several queries; int32.

    A sequence shares its first tokens, less than all of it, or none. They are divided into consecutive ranges.
    """

    sequences: Tensor  # [num_seqs, 4]: tokens shared, first range, number of ranges, index among a range's members
    ranges: Tensor  # [most, 5]: slot, begin, end, first of its members in `members`, number of members; end 0: unused
    members: Tensor  # [num_seqs]: sequences, those of one range in a row


class CascadeShape(NamedTuple):
    """How many ranges a step may have, and what they may hold."""

    ranges: int
    members: int  # most of one range
    tile: int  # tokens: a range has a multiple of it, the last one of a prefix excepted


class DecodeBatch(NamedTuple):
    """One query token for each of several sequences over contiguous slots."""

    slots: Tensor  # [num_seqs] int32
    lengths: Tensor  # [num_seqs] int32: tokens in the slot, the query's own included; 0: padding
    window: int | None = None  # how many tokens a query sees, its own included; None: all
    cascade: Cascade | None = None  # how the work may be divided; it does not change the result


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
