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

    def __dlpack__(self, **options: Any) -> Any:
        """A "dltensor" capsule; the protocol's options (stream, max_version, dl_device, copy) change nothing."""
        return self._cache.region_capsule(self._index)

    def __dlpack_device__(self) -> tuple[int, int]:
        device = self._cache.device
        return (_DL_CUDA if device.is_cuda else _DL_HOST, device.index)
