"""A slot of contiguous virtual memory for each request, mapped as it grows; knows no layout (the library does)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import CacheCapacity, Chunk, MemoryStats
from sarathi.model_executor.attention.address import SlotAddress
from sarathi.worker.cache_engine.base import CacheSettingsError, CacheShape
from vattention import DeviceError, OutOfMemoryError, VirtualKVCache

_ANCHOR_SLOT = 0


class vATTNCacheEngine:
    """vAttention: kernels see one tensor, pages come and go beneath it (Prabhu et al., ASPLOS 2025)."""

    def __init__(self, spec: BackendSpec, shape: CacheShape) -> None:
        anchored = needs_anchor(shape.place.device)
        try:
            self._cache = _open_cache(spec, shape, shape.max_num_seqs + anchored)
        except (ValueError, DeviceError) as error:
            memory = f"memory_bytes={shape.budget_bytes}, attention_backend='{spec}'"
            lengths = f"max_num_seqs={shape.max_num_seqs}, max_model_len={shape.max_model_len}"
            raise CacheSettingsError(f"{memory}, {lengths}: {error}") from error
        self._slots: dict[str, int] = {}
        self._tokens: dict[str, int] = {}  # in each slot, of those that its memory was granted for
        self._over_read_tokens, self._token_bytes = shape.over_read_tokens, shape.token_bytes
        self._anchor_rows = self._anchor() if anchored else 0
        self._anchored = self._cache.stats()  # what is mapped for nobody, if anything

    @property
    def capacity(self) -> CacheCapacity:
        cache = self._cache
        rows = cache.capacity_rows - self._anchor_rows
        return CacheCapacity(rows, cache.token_bytes, cache.page_bytes, self._over_read_tokens)

    def resize(self, budget_bytes: int) -> None:
        self._cache.resize(budget_bytes)

    def release(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            slot = self._slots.pop(request_id, None)
            self._tokens.pop(request_id, None)
            if slot is not None:
                self._cache.free(slot)

    def prepare(self, chunks: Sequence[Chunk]) -> None:
        new = [chunk for chunk in chunks if chunk.request_id not in self._slots]
        for chunk in new:
            self._slots[chunk.request_id] = self._cache.alloc(self._mapped(chunk.granted_tokens))
        try:
            self._cache.prepare(self._slots_of(chunks), [self._mapped(chunk.granted_tokens) for chunk in chunks])
        except OutOfMemoryError as error:
            self.release([chunk.request_id for chunk in new])
            ours = self._anchor_rows
            raise OutOfMemoryError(str(error), error.needed - ours, error.available - ours) from error
        except Exception:
            self.release([chunk.request_id for chunk in new])
            raise
        self._tokens.update((chunk.request_id, chunk.start + chunk.num_tokens) for chunk in chunks)

    def address(self, chunks: Sequence[Chunk]) -> SlotAddress:
        return SlotAddress(tuple(self._slots_of(chunks)))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._cache.layer(index)

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """A chunk that samples grows by the sampled token; what the others need was granted with the prompt."""
        growing = [chunk for chunk in chunks if chunk.samples]
        if growing:
            targets = [self._mapped(chunk.start + chunk.num_tokens + 1) for chunk in growing]
            self._cache.prefetch(self._slots_of(growing), targets, lead_tokens=len(growing))

    def stats(self) -> MemoryStats:
        stats = self._cache.stats()
        mapped_bytes = stats.mapped_bytes - self._anchored.mapped_bytes
        return MemoryStats(
            reserved_bytes=stats.reserved_bytes,
            created_bytes=stats.created_bytes - self._anchored.created_bytes,
            mapped_bytes=mapped_bytes,
            idle_bytes=stats.idle_bytes,
            wasted_bytes=mapped_bytes - stats.idle_bytes - sum(self._tokens.values()) * self._token_bytes,
            peak_mapped_bytes=stats.peak_mapped_bytes - self._anchored.mapped_bytes,
            driver_calls=stats.driver_calls,
            driver_s=stats.driver_s,
            steps_waited=stats.prepares_waited,
        )

    def check_integrity(self) -> None:
        self._cache.check_integrity()
        taken = list(self._slots.values())
        if len(set(taken)) != len(taken):
            raise RuntimeError(f"requests share a slot: {self._slots}")

    def close(self) -> None:
        self._slots.clear()
        self._tokens.clear()
        self._cache.close()

    def _anchor(self) -> int:
        """Maps the first page of every tensor for good, in a slot that no request gets; the rows that this takes."""
        self._cache.claim(_ANCHOR_SLOT)
        self._cache.prepare([_ANCHOR_SLOT], [1])
        return self._cache.rows_for(1)

    def _mapped(self, num_tokens: int) -> int:
        """Tokens that must have memory where a request has num_tokens: past its last one as far as kernels may read."""
        return min(num_tokens + self._over_read_tokens, self._cache.max_tokens)

    def _slots_of(self, chunks: Sequence[Chunk]) -> list[int]:
        return [self._slots[chunk.request_id] for chunk in chunks]


def needs_anchor(device: torch.device) -> bool:
    """Whether launchers look a tensor's address up, as Triton's does, and refuse one with no memory behind it."""
    return device.type == "cuda"


def _open_cache(spec: BackendSpec, shape: CacheShape, num_slots: int) -> VirtualKVCache:
    arch = shape.arch
    return VirtualKVCache(
        num_layers=arch.num_layers,
        num_kv_heads=arch.num_kv_heads,
        head_size=arch.head_size,
        num_slots=num_slots,
        max_tokens=shape.max_model_len,
        dtype=shape.place.dtype,
        device=shape.place.device,
        budget_bytes=shape.budget_bytes,
        page_bytes=spec.page_bytes,
        megacache=spec.megacache,
    )
