"""A reserved region as bytes, exported through DLPack; needs no array library."""

from __future__ import annotations

from typing import Any

from vattention import _native

_DL_HOST, _DL_CUDA = 1, 2  # DLDeviceType


class Region:
    """One region as a one-dimensional uint8 array; touching a byte of no prepared token faults.

    Arrays made from it keep the addresses alive, not the pages.
    """

    def __init__(self, cache: _native.KVCache, index: int) -> None:
        self._cache, self._index = cache, index

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **options: Any) -> Any:
        """A capsule of DLPack 1.0 if the consumer takes it (only then NumPy may write), else of 0.x.

        The protocol's other options (stream, dl_device, copy) are ignored.
        """
        if max_version is not None and max_version[0] >= 1:
            return self._cache.region_capsule(self._index, is_versioned=True)
        return self._cache.region_capsule(self._index)

    def __repr__(self) -> str:
        kind, index = self.__dlpack_device__()
        return f"Region({self._index} of a KV cache, uint8, {'cpu' if kind == _DL_HOST else f'cuda:{index}'})"

    def __dlpack_device__(self) -> tuple[int, int]:
        device = self._cache.device
        return (_DL_CUDA if device.is_cuda else _DL_HOST, device.index)
