"""Tensors whose physical memory is released and mapped again while their addresses stay."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from vattention import _native
from vattention.arguments import byte_count, default_page_bytes, element_bytes, open_device, sizes
from vattention.regions import Region

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 512  # bytes, that of torch's allocator on CUDA


class Arena:
    """Tensors side by side in one reserved address range, backed by physical memory all together or not at all.

    A tensor keeps its address as long as the arena exists, so views of it and captured CUDA graphs stay valid.
    `release` gives the memory back to the system, without the contents; `map` takes memory again. Tensors without
    memory must not be touched: the CPU gets SIGSEGV, CUDA error 700. Tensors do not keep the arena alive: hold it as
    long as they are used. Threads may share an arena; a forked process must not use it.

    Args:
        max_bytes: addresses to reserve, for all tensors together. They cost no memory.
        device: "cpu", "cuda", "cuda:1", a CUDA index, or a torch.device.

    Raises ValueError or TypeError for arguments out of range, DeviceError if the device refuses.
    """

    def __init__(self, max_bytes: int, device: str | int | torch.device = "cpu") -> None:
        memory = open_device(device)
        self.page_bytes = default_page_bytes(memory)
        max_pages = self._pages(byte_count("max_bytes", max_bytes, least=1))
        self.max_bytes = max_pages * self.page_bytes
        self.used_bytes = 0  # of max_bytes, with the gaps of alignment
        # A cache of one region and one slot whose tokens are pages: the pages of its prepared length have memory.
        self._native = _native.KVCache(
            device=memory, num_regions=1, token_bytes=self.page_bytes, num_slots=1, max_tokens=max_pages,
            page_bytes=self.page_bytes, budget_bytes=self.page_bytes,
            policy=_native.Policy(deferred_reclamation=False, reclaim_threshold=0.0, max_extent_rows=64),
        )  # fmt: skip
        self._native.claim(0)
        self._bytes: torch.Tensor | None = None  # the whole range as torch sees it, from its first use

    @property
    def is_mapped(self) -> bool:
        """Whether tensors may be touched."""
        return self._native.slot_state(0)[1] > 0

    @property
    def created_bytes(self) -> int:
        """Physical memory held: whole pages while mapped, one page at most while not. On the CPU the kernel commits a
        page when it is first touched."""
        created: int = self._native.stats()["created_bytes"]
        return created

    def empty(self, shape: Sequence[int], dtype: torch.dtype | str) -> torch.Tensor:
        """A new contiguous tensor; its address is a multiple of 512. It has memory while the arena `is_mapped`.

        Raises ValueError if the arena has too few addresses left, and as `map` does.
        """
        from vattention.tensors import typed

        shape = sizes("shape", shape)
        num_bytes = prod(shape) * element_bytes(dtype)
        begin = -(-self.used_bytes // _ALIGNMENT) * _ALIGNMENT
        end = begin + num_bytes
        if end > self.max_bytes:
            raise ValueError(
                f"a tensor of shape {shape} takes {num_bytes} bytes: {begin} of max_bytes={self.max_bytes} are used"
            )
        tensor = typed(self._range()[begin:end], dtype).view(shape)
        if self.is_mapped:
            self._back(end)
        self.used_bytes = end
        return tensor

    def map(self) -> None:
        """Take memory for every tensor, with undefined contents. No effect if it is mapped already.

        Raises OutOfMemoryError or DeviceError, and then changes nothing.
        """
        self._back(self.used_bytes)

    def release(self) -> None:
        """Release the memory, all but one page at most. Idempotent.

        The caller guarantees that nothing on the device touches a tensor.
        """
        self._native.free(0)
        self._native.claim(0)
        self._native.resize(self.page_bytes)

    def check_integrity(self) -> None:
        """Recount everything; raises IntegrityError naming the first inconsistency."""
        self._native.check_integrity()

    def close(self) -> None:
        """Release all memory for good. Idempotent."""
        self._bytes = None
        self._native.close()

    def _back(self, num_bytes: int) -> None:
        """Map memory for the first `num_bytes` of the range; if it raises, no more is mapped than before."""
        pages = max(1, self._pages(num_bytes))
        before = max(1, self._native.slot_state(0)[1])
        self._native.resize(max(before, pages) * self.page_bytes)
        try:
            self._native.prepare([0], [pages])
        except Exception:
            self._native.resize(before * self.page_bytes)
            raise

    def _pages(self, num_bytes: int) -> int:
        return -(-num_bytes // self.page_bytes)

    def _range(self) -> torch.Tensor:
        from vattention.tensors import region_tensor

        if self._bytes is None:
            self._bytes = region_tensor(Region(self._native, 0), "uint8")
        return self._bytes
