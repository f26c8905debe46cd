"""A reserved region as bytes, through DLPack: no array library is needed here."""

from __future__ import annotations

from typing import Any

from vattention import _native

_DL_HOST, _DL_CUDA = 1, 2  # DLDeviceType


class Region:
    """One region as a one-dimensional uint8 array; reading a byte of it that no prepared token owns faults.

    An array made from it keeps the addresses alive, not the pages.
    """

    def __init__(self, cache: _native.KVCache, index: int) -> None:
        self._cache, self._index = cache, index

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **options: Any) -> Any:
        """A capsule of DLPack 1.0 for who takes it, which alone may be written through NumPy, else of 0.x.

        The protocol's other options (stream, dl_device, copy) change nothing.
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
