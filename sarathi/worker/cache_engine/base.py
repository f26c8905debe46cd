"""The interface of cache engines, and what a cache holds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sarathi.messages import NO_CHANGES, CacheCapacity, Chunk, MemoryStats, PrefixChanges, SharedPrefix
from sarathi.model_executor.attention.address import Address


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one rank's cache holds; its budget in bytes is a number apart.

    num_layers, num_kv_heads: of this rank. dtype: of keys and values. max_num_seqs: requests that run at the same time.
    max_model_len: tokens of the longest request. over_read_tokens: see CacheCapacity.
    num_retained: ended requests whose memory may be kept; 0: none.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    max_num_seqs: int
    max_model_len: int
    over_read_tokens: int = 0
    num_retained: int = 0

    @property
    def token_bytes(self) -> int:
        """One token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.dtype.itemsize


class CacheSettingsError(ValueError):
    """Budget, page or block size leave no room for a request; the message gives the numbers."""


def first_sources(copies: Iterable[tuple[int, int]]) -> list[int]:
    """Where each (source, target) copies from, if all are copied at once in no order.

    A source that is the target of an earlier copy has nothing to read yet: the first source of such a chain is read.
    """
    firsts: dict[int, int] = {}  # target -> source
    for source, target in copies:
        firsts[target] = firsts.get(source, source)
    return list(firsts.values())


class CacheEngine(Protocol):
    """Keys and values of all requests on one device."""

    @property
    def capacity(self) -> CacheCapacity:
        """Rows that a block space manager may grant."""

    @property
    def block_size(self) -> int | None:
        """Tokens of a block; None where a request's memory is contiguous."""

    def resize(self, budget_bytes: int) -> None:
        """Change the budget, where the cache can be resized."""

    def resize_rows(self, rows: int) -> None:
        """Change the budget to `rows` of `capacity`, where the cache can be resized.

        Raises vattention.OutOfMemoryError where requests hold more.
        """

    def clear(self, request_ids: Iterable[str]) -> None:
        """Zero the memory of requests, which NaN would outlive: kernels multiply what is past a length by 0.

        What others share stays: they are cleared too, if there is a NaN in it. To be called before release.
        """

    def release(self, request_ids: Iterable[str], changes: PrefixChanges = NO_CHANGES) -> None:
        """Free the memory of requests that no step in flight uses, except of those that `changes` retains.

        Then shorten, free and hand over what is retained, as `changes` says. Requests without memory are ignored, and
        unknown keys, which belong to steps that an exception kept from the worker.
        """

    def prepare(self, chunks: Sequence[Chunk], shared: Sequence[SharedPrefix] = ()) -> None:
        """Map memory for every chunk's granted tokens, of it what new requests share.

        Raises vattention.OutOfMemoryError, with nothing changed.
        """

    def copy_prefixes(self) -> None:
        """Copy what the requests of the last `prepare` have as copies, in stream order: after all earlier steps."""

    def cancel(self, chunks: Sequence[Chunk]) -> None:
        """Undo the last `prepare`, which succeeded here and not on another rank. Keeps the tokens before the chunks."""

    def address(self, chunks: Sequence[Chunk]) -> Address:
        """Slots or block tables of the chunks, in order."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [slots or blocks, tokens, num_kv_heads, head_size]."""

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """Start to map in the background what the step after this one needs; returns at once."""

    def stats(self) -> MemoryStats:
        """Bytes held, and the driver calls and seconds spent on them."""

    def ranges(self, request_id: str, first: int, end: int) -> list[list[Tensor]]:
        """Memory of a request's tokens [first, end) as flat contiguous tensors, K and V.

        Entry i: ranges that are complete once layer i is computed.
        """

    def lengths(self) -> dict[str, tuple[int, int]]:
        """Tokens of each request, computed and mapped: the same on every rank."""

    def check_integrity(self) -> None:
        """Raise RuntimeError where the accounting is inconsistent."""

    def close(self) -> None:
        """Release all memory."""
