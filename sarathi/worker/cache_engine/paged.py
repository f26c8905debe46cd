"""Paged KV cache: blocks of one tensor per layer, found through block tables (Kwon et al., SOSP 2023)."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import NO_CHANGES, CacheCapacity, Chunk, MemoryStats, PrefixChanges, SharedPrefix
from sarathi.model_executor.attention.address import BlockAddress
from sarathi.worker.cache_engine.base import CacheSettingsError, KVCacheSpec, first_sources

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
        self._num_retained = spec.num_retained
        self._tables: dict[str, list[int]] = {}
        self._tokens: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._free_numbers = list(range(min(self._num_blocks, spec.max_num_seqs) - 1, -1, -1))
        self._holders: Counter[int] = Counter()  # tables that a block is in
        self._shared: list[SharedPrefix] = []  # of which blocks are to be copied
        self._peak_blocks = 0

    @property
    def capacity(self) -> CacheCapacity:
        return CacheCapacity(self._num_blocks, 1, self.block_size, num_retained=self._num_retained)

    def resize(self, budget_bytes: int) -> None:
        """Nothing changes: tensors cannot grow in place."""

    def resize_rows(self, rows: int) -> None:
        """Nothing changes: tensors cannot grow in place."""

    def clear(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            blocks = self._tables.get(request_id, [])
            self._keys[:, blocks] = self._values[:, blocks] = 0

    def release(self, request_ids: Iterable[str], changes: PrefixChanges = NO_CHANGES) -> None:
        """The block space manager keeps retained blocks: here they are in no table."""
        for request_id in request_ids:
            self._forget(self._tables.pop(request_id, ()))
            self._tokens.pop(request_id, None)
            number = self._numbers.pop(request_id, None)
            if number is not None:
                self._free_numbers.append(number)

    def prepare(self, chunks: Sequence[Chunk], shared: Sequence[SharedPrefix] = ()) -> None:
        for chunk in chunks:
            if chunk.request_id not in self._tables:
                self._tables[chunk.request_id] = []
                self._numbers[chunk.request_id] = self._free_numbers.pop()
            self._tables[chunk.request_id].extend(chunk.block_ids)
            self._holders.update(chunk.block_ids)
            self._tokens[chunk.request_id] = chunk.start + chunk.num_tokens
        self._shared = [prefix for prefix in shared if prefix.request_id in self._tables and prefix.source_block >= 0]
        self._peak_blocks = max(self._peak_blocks, len(self._holders))

    def copy_prefixes(self) -> None:
        """Only whole blocks are shared, so at most one block is copied: no token behind the prefix, as one may arrive
        from another engine meanwhile."""
        shared, self._shared = self._shared, []
        if shared:
            cuts = [slice(prefix.num_tokens - prefix.num_mapped) for prefix in shared]
            targets = [self._tables[prefix.request_id][prefix.num_mapped // self.block_size] for prefix in shared]
            sources = first_sources((each.source_block, target) for each, target in zip(shared, targets, strict=True))
            tensors = (self._keys, self._values)
            torch._foreach_copy_(
                [each[:, target, cut] for target, cut in zip(targets, cuts, strict=True) for each in tensors],
                [each[:, source, cut] for source, cut in zip(sources, cuts, strict=True) for each in tensors],
            )

    def cancel(self, chunks: Sequence[Chunk]) -> None:
        self._shared = []
        for chunk in chunks:
            table = self._tables[chunk.request_id]
            del table[len(table) - len(chunk.block_ids) :]
            self._forget(chunk.block_ids)
            self._tokens[chunk.request_id] = chunk.start

    def address(self, chunks: Sequence[Chunk]) -> BlockAddress:
        names = [chunk.request_id for chunk in chunks]
        return BlockAddress(
            tuple(self._tables[name] for name in names), self.block_size, tuple(map(self._numbers.__getitem__, names))
        )

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._keys[index], self._values[index]

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """Every block is mapped from the start."""

    def stats(self) -> MemoryStats:
        """All blocks are created at the start; those in a block table count as mapped."""
        created, used = self._num_blocks * self._block_bytes, len(self._holders) * self._block_bytes
        return MemoryStats(
            reserved_bytes=created,
            created_bytes=created,
            mapped_bytes=used,
            wasted_bytes=self._num_unused_tokens() * self._token_bytes,
            peak_mapped_bytes=self._peak_blocks * self._block_bytes,
        )

    def ranges(self, request_id: str, first: int, end: int) -> list[list[Tensor]]:
        """Two a layer and block."""
        size, table = self.block_size, self._tables[request_id]
        spans = [
            (table[block], max(first - block * size, 0), min(end - block * size, size))
            for block in range(first // size, -(-end // size))
        ]
        return [
            [cache[block, start:stop].view(-1) for cache in (keys, values) for block, start, stop in spans]
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def lengths(self) -> dict[str, tuple[int, int]]:
        return {name: (self._tokens[name], len(table) * self.block_size) for name, table in self._tables.items()}

    def check_integrity(self) -> None:
        """No block is out of range, or counted wrongly, and every token has its block."""
        holders = Counter(block for table in self._tables.values() for block in table)
        if holders != self._holders or not all(0 <= block < self._num_blocks for block in holders):
            raise RuntimeError(f"blocks counted wrongly or outside [0, {self._num_blocks}): {self._tables}")
        short = [name for name, table in self._tables.items() if len(table) * self.block_size < self._tokens[name]]
        if short:
            raise RuntimeError(f"tables shorter than the tokens in them: {', '.join(short)}")

    def close(self) -> None:
        self._tables.clear()
        self._tokens.clear()
        self._keys = self._values = torch.empty(0)

    def _forget(self, blocks: Iterable[int]) -> None:
        """Count blocks that have left a table."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]

    def _num_unused_tokens(self) -> int:
        """Places for tokens behind the last one of each request."""
        places = sum(map(len, self._tables.values())) * self.block_size
        return places - sum(self._tokens.values())
