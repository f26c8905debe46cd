"""What a cache engine does for a worker, and its sizes; knows neither virtual memory nor blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sarathi.messages import CacheCapacity, Chunk, MemoryStats
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address
from sarathi.model_executor.placement import Placement


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What is kept for each token, for how many requests and tokens of one at most, in how many bytes.

    over_read_tokens: see CacheCapacity.
    """

    arch: ModelArchitecture
    place: Placement
    max_num_seqs: int
    max_model_len: int
    budget_bytes: int
    over_read_tokens: int = 0

    @property
    def token_bytes(self) -> int:
        """One token's K and V in all layers."""
        arch = self.arch
        return 2 * arch.num_layers * arch.num_kv_heads * arch.head_size * self.place.dtype.itemsize


class CacheSettingsError(ValueError):
    """Budget, page or block leave room for nothing; the message does the arithmetic."""


class CacheEngine(Protocol):
    """K and V of all requests on one device."""

    @property
    def capacity(self) -> CacheCapacity:
        """What the block space manager may grant."""

    def resize(self, budget_bytes: int) -> None:
        """Changes the budget, as far as the memory is of a kind that can be."""

    def release(self, request_ids: Iterable[str]) -> None:
        """Their memory may be used again; no step in flight touches it. Unknown requests hold none."""

    def prepare(self, chunks: Sequence[Chunk]) -> None:
        """On return there is memory for every chunk's granted tokens.

        Raises vattention.OutOfMemoryError, and then holds what it held before.
        """

    def address(self, chunks: Sequence[Chunk]) -> Address:
        """Where the chunks' tokens lie, in the order of the chunks."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [rows, cols, num_kv_heads, head_size]."""

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """Starts to get memory for the step after this one; best effort, returns at once."""

    def stats(self) -> MemoryStats:
        """Bytes held and what they cost."""

    def check_integrity(self) -> None:
        """Raises where the books disagree."""

    def close(self) -> None:
        """Gives all memory back."""
