"""Paged KV cache: blocks of one tensor per layer, found through block tables (Kwon et al., SOSP 2023)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import CacheCapacity, Chunk, MemoryStats
from sarathi.model_executor.attention.address import BlockAddress
from sarathi.worker.cache_engine.base import CacheSettingsError, KVCacheSpec

DEFAULT_BLOCK_SIZE = 16


class PagedCacheEngine:
    """All memory is allocated at the start; a request's block table grows by the block ids in its chunks."""

    def __init__(self, backend: BackendSpec, spec: KVCacheSpec, device: torch.device, budget_bytes: int) -> None:
        self.block_size = backend.block_size or DEFAULT_BLOCK_SIZE
        self._token_bytes = spec.token_bytes
        self._block_bytes = self._token_bytes * self.block_size
        self._num_blocks = budget_bytes // self._block_bytes
        if not self._num_blocks:
            raise CacheSettingsError(
                f"memory_bytes={budget_bytes} is less than one block of {self.block_size} tokens: "
                f"{self._block_bytes} bytes"
            )
        size = (2, spec.num_layers, self._num_blocks, self.block_size, spec.num_kv_heads, spec.head_size)
        try:
            self._keys, self._values = torch.empty(size, dtype=spec.dtype, device=device)
        except RuntimeError as error:  # torch's out-of-memory errors, on CPU and GPU
            raise CacheSettingsError(f"memory_bytes={budget_bytes} is more than {device} can give") from error
        if device.type == "cuda":  # kernels read whole tiles: a NaN left in one would reach results as 0 * NaN
            self._keys.zero_()
            self._values.zero_()
        self._tables: dict[str, list[int]] = {}
        self._tokens: dict[str, int] = {}
        self._peak_blocks = 0

    @property
    def capacity(self) -> CacheCapacity:
        return CacheCapacity(self._num_blocks, 1, self.block_size)

    def resize(self, budget_bytes: int) -> None:
        """Nothing changes: tensors cannot grow in place."""

    def clear(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            blocks = self._tables.get(request_id, [])
            self._keys[:, blocks] = self._values[:, blocks] = 0

    def release(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._tables.pop(request_id, None)
            self._tokens.pop(request_id, None)

    def prepare(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._tables.setdefault(chunk.request_id, []).extend(chunk.block_ids)
            self._tokens[chunk.request_id] = chunk.start + chunk.num_tokens
        self._peak_blocks = max(self._peak_blocks, self._used_blocks())

    def cancel(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            table = self._tables[chunk.request_id]
            del table[len(table) - len(chunk.block_ids) :]
            self._tokens[chunk.request_id] = chunk.start

    def address(self, chunks: Sequence[Chunk]) -> BlockAddress:
        return BlockAddress(tuple(self._tables[chunk.request_id] for chunk in chunks), self.block_size)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._keys[index], self._values[index]

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """Every block is mapped from the start."""

    def stats(self) -> MemoryStats:
        """All blocks are created at the start; those in a block table count as mapped."""
        created, used = self._num_blocks * self._block_bytes, self._used_blocks() * self._block_bytes
        return MemoryStats(
            reserved_bytes=created,
            created_bytes=created,
            mapped_bytes=used,
            wasted_bytes=used - sum(self._tokens.values()) * self._token_bytes,
            peak_mapped_bytes=self._peak_blocks * self._block_bytes,
        )

    def lengths(self) -> dict[str, tuple[int, int]]:
        return {name: (self._tokens[name], len(table) * self.block_size) for name, table in self._tables.items()}

    def check_integrity(self) -> None:
        """No block is in two tables, none is out of range, and every token has its block."""
        blocks = [block for table in self._tables.values() for block in table]
        if len(set(blocks)) != len(blocks) or not all(0 <= block < self._num_blocks for block in blocks):
            raise RuntimeError(f"blocks shared or outside [0, {self._num_blocks}): {self._tables}")
        short = [name for name, table in self._tables.items() if len(table) * self.block_size < self._tokens[name]]
        if short:
            raise RuntimeError(f"tables shorter than the tokens in them: {', '.join(short)}")

    def close(self) -> None:
        self._tables.clear()
        self._tokens.clear()
        self._keys = self._values = torch.empty(0)

    def _used_blocks(self) -> int:
        return sum(map(len, self._tables.values()))
