"""KV cache in contiguous virtual memory: one slot per request, mapped to physical pages as the request grows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import EVERY_KEY, NO_CHANGES, CacheCapacity, Chunk, MemoryStats, PrefixChanges, SharedPrefix
from sarathi.model_executor.attention.address import SlotAddress
from sarathi.worker.cache_engine.base import CacheSettingsError, KVCacheSpec, first_sources
from vattention import DeviceError, OutOfMemoryError, VirtualKVCache

_ANCHOR_SLOT = 0


@dataclass(slots=True)
class _Slot:
    """A slot in use. num_tokens: computed; num_prepared: mapped; num_shared: leading ones that other slots map too."""

    number: int
    num_tokens: int = 0
    num_prepared: int = 0
    num_shared: int = 0


class _Copy(NamedTuple):
    """Tokens [begin, end) of slot `source` to slot `target`."""

    source: int
    target: int
    begin: int
    end: int


class vATTNCacheEngine:
    """vAttention: kernels see one tensor per layer, whose pages are mapped on demand (Prabhu et al., ASPLOS 2025).

    Slots belong to running requests, by id, and to retained sequences, by key.
    """

    block_size = None

    def __init__(self, backend: BackendSpec, spec: KVCacheSpec, device: torch.device, budget_bytes: int) -> None:
        anchored = needs_anchor(device)
        self._num_retained = spec.num_retained
        try:
            self._cache = VirtualKVCache(
                num_layers=spec.num_layers,
                num_kv_heads=spec.num_kv_heads,
                head_size=spec.head_size,
                num_slots=spec.max_num_seqs + spec.num_retained + anchored,
                max_tokens=spec.max_model_len,
                dtype=spec.dtype,
                device=device,
                budget_bytes=budget_bytes,
                page_bytes=backend.page_bytes,
                megacache=backend.megacache,
                max_extent_rows=_extent_rows(backend) if spec.num_retained and device.type == "cuda" else 64,
            )
        except (ValueError, DeviceError) as error:
            memory = f"memory_bytes={budget_bytes}, attention_backend='{backend}'"
            lengths = f"max_num_seqs={spec.max_num_seqs}, max_model_len={spec.max_model_len}"
            raise CacheSettingsError(f"{memory}, {lengths}: {error}") from error
        self._share_rows = self._common_rows(_extent_rows(backend) if device.type == "cuda" else 1)
        self._slots: dict[str | int, _Slot] = {}
        self._started: list[str] = []  # requests that got a slot in the last `prepare`
        self._lengths_before: dict[str, int] = {}  # prepared lengths of the other requests before the last `prepare`
        self._copies: list[_Copy] = []
        self._over_read_tokens, self._token_bytes = spec.over_read_tokens, spec.token_bytes
        self._maps_ahead = not backend.sync
        self._anchor_rows = self._anchor() if anchored else 0
        self._anchored = self._cache.stats()  # mapped for no request

    @property
    def capacity(self) -> CacheCapacity:
        cache, over_read = self._cache, self._over_read_tokens
        rows = cache.capacity_rows - self._anchor_rows
        return CacheCapacity(
            rows, cache.token_bytes, cache.page_bytes, over_read, self._num_retained, self._share_rows
        )  # fmt: skip

    def resize(self, budget_bytes: int) -> None:
        self._cache.resize(budget_bytes)

    def resize_rows(self, rows: int) -> None:
        self._cache.resize(max(rows + self._anchor_rows, 1) * self._cache.row_bytes)

    def clear(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            slot = self._slots.get(request_id)
            if slot is not None:
                for layer in range(self._cache.num_layers):
                    for tensor in self._cache.view(slot.number, layer):
                        tensor[slot.num_shared :].zero_()

    def release(self, request_ids: Iterable[str], changes: PrefixChanges = NO_CHANGES) -> None:
        for request_id, key in changes.retained:
            self._rename(request_id, key)
        for request_id in request_ids:
            self._free(request_id)
        for key, rows in changes.evicted:
            for each in [other for other in self._slots if isinstance(other, int)] if key == EVERY_KEY else [key]:
                self._shorten(each, rows)
        for request_id, key in changes.continued:
            self._rename(key, request_id)

    def prepare(self, chunks: Sequence[Chunk], shared: Sequence[SharedPrefix] = ()) -> None:
        new = [chunk for chunk in chunks if chunk.request_id not in self._slots]
        self._started = [chunk.request_id for chunk in new]
        names = [chunk.request_id for chunk in chunks if chunk.request_id in self._slots]
        self._lengths_before = {name: self._slots[name].num_prepared for name in names}
        self._copies = []
        try:
            self._enter(new, {prefix.request_id: prefix for prefix in shared})
            targets = [self._mapped(chunk.granted_tokens) for chunk in chunks]
            self._cache.prepare(self._slots_of(chunks), targets)
        except OutOfMemoryError as error:
            self.release(self._started)
            ours = self._anchor_rows
            raise OutOfMemoryError(str(error), error.needed - ours, error.available - ours) from error
        except Exception:
            self.release(self._started)
            raise
        for chunk, target in zip(chunks, targets, strict=True):
            slot = self._slots[chunk.request_id]
            slot.num_tokens = chunk.start + chunk.num_tokens
            slot.num_shared = min(slot.num_shared, chunk.start)  # those that it maps alone again are written from here
            slot.num_prepared = max(slot.num_prepared, target)

    def _enter(self, new: Iterable[Chunk], shared: Mapping[str, SharedPrefix]) -> None:
        """Give new requests slots, with the pages that they share."""
        for chunk in new:
            prefix = shared.get(chunk.request_id)
            is_mapped = prefix is not None and prefix.num_mapped > 0  # what an idle slot has mapped would go
            slot = _Slot(self._cache.alloc(0 if is_mapped else self._mapped(chunk.granted_tokens)))
            self._slots[chunk.request_id] = slot
            if prefix is not None:
                self._share(prefix, slot)

    def _share(self, prefix: SharedPrefix, target: _Slot) -> None:
        source = self._slots[prefix.source]
        if prefix.num_mapped:
            self._cache.share(source.number, target.number, prefix.num_mapped)
            source.num_shared = max(source.num_shared, prefix.num_mapped)
            target.num_shared = target.num_prepared = prefix.num_mapped
        if prefix.num_tokens > prefix.num_mapped:
            self._copies.append(_Copy(source.number, target.number, prefix.num_mapped, prefix.num_tokens))

    @torch.inference_mode()
    def copy_prefixes(self) -> None:
        copies, self._copies = self._copies, []
        if copies:
            tensors, cuts = self._cache.tensors(), [slice(copy.begin, copy.end) for copy in copies]
            sources = first_sources((copy.source, copy.target) for copy in copies)
            torch._foreach_copy_(
                [tensor[copy.target, cut] for copy, cut in zip(copies, cuts, strict=True) for tensor in tensors],
                [tensor[source, cut] for source, cut in zip(sources, cuts, strict=True) for tensor in tensors],
            )

    def cancel(self, chunks: Sequence[Chunk]) -> None:
        self.release(self._started)
        self._copies = []
        for chunk in chunks:
            if (slot := self._slots.get(chunk.request_id)) is not None:
                slot.num_prepared = self._cache.trim(slot.number, self._lengths_before[chunk.request_id])
                slot.num_tokens = chunk.start

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
        running = [slot for owner, slot in self._slots.items() if isinstance(owner, str)]
        ahead = sum(slot.num_prepared - slot.num_tokens for slot in running)
        unused = sum(self._bytes_behind(slot) for owner, slot in self._slots.items() if isinstance(owner, int))
        mapped_bytes = stats.mapped_bytes - self._anchored.mapped_bytes
        return MemoryStats(
            reserved_bytes=stats.reserved_bytes,
            created_bytes=stats.created_bytes - self._anchored.created_bytes,
            mapped_bytes=mapped_bytes,
            idle_bytes=stats.idle_bytes,
            wasted_bytes=stats.wasted_bytes - self._anchored.wasted_bytes - unused + ahead * self._token_bytes,
            peak_mapped_bytes=stats.peak_mapped_bytes - self._anchored.mapped_bytes,
            driver_calls=stats.driver_calls,
            driver_s=stats.driver_s,
            steps_waited=stats.prepares_waited,
        )

    def ranges(self, request_id: str, first: int, end: int) -> list[list[Tensor]]:
        """Two a layer; two in all, with the last layer, where a region holds all layers."""
        slot, layers = self._slots[request_id].number, self._cache.num_layers
        pieces = [region[slot, first:end].view(-1) for region in self._cache.tensors()]
        if len(pieces) < 2 * layers:
            return [[] for _ in range(layers - 1)] + [pieces]
        return [[pieces[layer], pieces[layers + layer]] for layer in range(layers)]

    def lengths(self) -> dict[str, tuple[int, int]]:
        requests = {name: slot for name, slot in self._slots.items() if isinstance(name, str)}
        return {name: (slot.num_tokens, self._cache.slot_state(slot.number)[1]) for name, slot in requests.items()}

    def check_integrity(self) -> None:
        self._cache.check_integrity()
        taken = [slot.number for slot in self._slots.values()]
        if len(set(taken)) != len(taken):
            raise RuntimeError(f"requests share a slot: {self._slots}")

    def close(self) -> None:
        self._slots.clear()
        self._cache.close()

    def _anchor(self) -> int:
        """Map the first page of every tensor, in a slot that no request gets; returns the rows that it takes."""
        self._cache.claim(_ANCHOR_SLOT)
        self._cache.prepare([_ANCHOR_SLOT], [1])
        return self._cache.rows_for(1)

    def _mapped(self, num_tokens: int) -> int:
        """Tokens to map for a request of num_tokens: kernels may read past its last one."""
        return min(num_tokens + self._over_read_tokens, self._cache.max_tokens)

    def _bytes_behind(self, slot: _Slot) -> int:
        """Of the rows up to a slot's prepared length, what lies behind it."""
        cache = self._cache
        return cache.rows_for(slot.num_prepared) * cache.row_bytes - slot.num_prepared * self._token_bytes

    def _slots_of(self, chunks: Sequence[Chunk]) -> list[int]:
        return [self._slots[chunk.request_id].number for chunk in chunks]

    def _free(self, owner: str | int) -> None:
        slot = self._slots.pop(owner, None)
        if slot is not None:
            self._cache.free(slot.number)

    def _rename(self, owner: str | int, new: str | int) -> None:
        slot = self._slots.pop(owner, None)
        if slot is not None:
            self._slots[new] = slot

    def _shorten(self, key: int, rows: int) -> None:
        slot = self._slots.get(key)
        if not rows or slot is None:
            self._free(key)
            return
        num_tokens = rows * self._cache.page_bytes // self._cache.token_bytes
        slot.num_prepared = self._cache.trim(slot.number, min(num_tokens, self._cache.max_tokens))
        slot.num_tokens, slot.num_shared = min(slot.num_tokens, num_tokens), min(slot.num_shared, num_tokens)

    def _common_rows(self, rows: int) -> int:
        """The least multiple of `rows` rows that holds whole tokens."""
        return lcm(rows, self._cache.token_bytes // gcd(self._cache.token_bytes, self._cache.page_bytes))


def needs_anchor(device: torch.device) -> bool:
    """Whether kernel launchers, as Triton's, refuse a tensor whose address is not mapped."""
    return device.type == "cuda"


def _extent_rows(backend: BackendSpec) -> int:
    """Rows that CUDA can share or unmap only together, where prefixes are cached.

    A call of the driver takes as long for 16 rows as for one. A row has the tokens of a page: of all layers with
    megacache, and so a sixteenth or less.
    """
    return 16 if backend.megacache else 4
