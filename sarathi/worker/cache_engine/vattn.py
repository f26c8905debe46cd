"""KV cache in contiguous virtual memory: one slot per request, mapped to physical pages as the request grows."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import CacheCapacity, Chunk, MemoryStats
from sarathi.model_executor.attention.address import SlotAddress
from sarathi.worker.cache_engine.base import CacheSettingsError, KVCacheSpec
from vattention import DeviceError, OutOfMemoryError, VirtualKVCache

_ANCHOR_SLOT = 0


class vATTNCacheEngine:
    """vAttention: kernels see one tensor per layer, whose pages are mapped on demand (Prabhu et al., ASPLOS 2025)."""

    block_size = None

    def __init__(self, backend: BackendSpec, spec: KVCacheSpec, device: torch.device, budget_bytes: int) -> None:
        anchored = needs_anchor(device)
        try:
            self._cache = VirtualKVCache(
                num_layers=spec.num_layers,
                num_kv_heads=spec.num_kv_heads,
                head_size=spec.head_size,
                num_slots=spec.max_num_seqs + anchored,
                max_tokens=spec.max_model_len,
                dtype=spec.dtype,
                device=device,
                budget_bytes=budget_bytes,
                page_bytes=backend.page_bytes,
                megacache=backend.megacache,
            )
        except (ValueError, DeviceError) as error:
            memory = f"memory_bytes={budget_bytes}, attention_backend='{backend}'"
            lengths = f"max_num_seqs={spec.max_num_seqs}, max_model_len={spec.max_model_len}"
            raise CacheSettingsError(f"{memory}, {lengths}: {error}") from error
        self._slots: dict[str, int] = {}
        self._tokens: dict[str, int] = {}  # computed tokens of each request that has a slot
        self._started: list[str] = []  # requests that got a slot in the last `prepare`
        self._over_read_tokens, self._token_bytes = spec.over_read_tokens, spec.token_bytes
        self._maps_ahead = not backend.sync
        self._anchor_rows = self._anchor() if anchored else 0
        self._anchored = self._cache.stats()  # mapped for no request

    @property
    def capacity(self) -> CacheCapacity:
        cache = self._cache
        rows = cache.capacity_rows - self._anchor_rows
        return CacheCapacity(rows, cache.token_bytes, cache.page_bytes, self._over_read_tokens)

    def resize(self, budget_bytes: int) -> None:
        self._cache.resize(budget_bytes)

    def clear(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id in self._slots:
                for layer in range(self._cache.num_layers):
                    for tensor in self._cache.view(self._slots[request_id], layer):
                        tensor.zero_()

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
        self._started = [chunk.request_id for chunk in new]
        self._tokens.update((chunk.request_id, chunk.start + chunk.num_tokens) for chunk in chunks)

    def cancel(self, chunks: Sequence[Chunk]) -> None:
        self.release(self._started)
        for chunk in chunks:
            if (slot := self._slots.get(chunk.request_id)) is not None:
                self._cache.trim(slot, self._mapped(chunk.start))
                self._tokens[chunk.request_id] = chunk.start

    def address(self, chunks: Sequence[Chunk]) -> SlotAddress:
        return SlotAddress(tuple(self._slots_of(chunks)))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._cache.layer(index)

    def prefetch(self, chunks: Sequence[Chunk]) -> None:
        """A chunk that samples grows by one token; memory of the others was granted with the prompt."""
        growing = [chunk for chunk in chunks if chunk.samples] if self._maps_ahead else []
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

    def lengths(self) -> dict[str, tuple[int, int]]:
        return {name: (self._tokens[name], self._cache.slot_state(slot)[1]) for name, slot in self._slots.items()}

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
        """Map the first page of every tensor, in a slot that no request gets; returns the rows that it takes."""
        self._cache.claim(_ANCHOR_SLOT)
        self._cache.prepare([_ANCHOR_SLOT], [1])
        return self._cache.rows_for(1)

    def _mapped(self, num_tokens: int) -> int:
        """Tokens to map for a request of num_tokens: kernels may read past its last one."""
        return min(num_tokens + self._over_read_tokens, self._cache.max_tokens)

    def _slots_of(self, chunks: Sequence[Chunk]) -> list[int]:
        return [self._slots[chunk.request_id] for chunk in chunks]


def needs_anchor(device: torch.device) -> bool:
    """Whether kernel launchers, as Triton's, refuse a tensor whose address is not mapped."""
    return device.type == "cuda"
