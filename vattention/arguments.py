"""Checks of the public calls' arguments. Errors name the argument, its value and what is allowed."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, SupportsFloat

from vattention import _native

if TYPE_CHECKING:
    import torch

DEFAULT_HOST_PAGE_BYTES = 64 * 1024
_MAX_BYTES = 1 << 62
_ITEM_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "bfloat16": 2, "float16": 2, "int16": 2, "float32": 4, "int32": 4, "float64": 8, "int64": 8, "complex64": 8,
    "complex128": 16,
}  # fmt: skip


def open_device(device: str | int | torch.device) -> _native.Device:
    """The memory behind "cpu", "cuda", "cuda:1", a CUDA index, or a torch.device.

    "cuda" without an index is torch's current device, or device 0 where torch is not imported. Raises ValueError for
    other devices and DeviceError if there is no such GPU.
    """
    kind, index = _kind_and_index(device)
    if kind == "cpu":
        return _native.host_device()
    if kind == "cuda" and (index is None or index >= 0):
        return _native.cuda_device(_current_cuda_device() if index is None else index)
    raise ValueError(f"device must be 'cpu', 'cuda', 'cuda:N', a CUDA index or a torch.device, got {device!r}")


def default_page_bytes(memory: _native.Device) -> int:
    """64 KiB on the CPU, the driver's granularity on CUDA."""
    return memory.granularity if memory.is_cuda else max(DEFAULT_HOST_PAGE_BYTES, memory.granularity)


def element_bytes(dtype: Any) -> int:
    """Bytes of one element. Raises ValueError for an unknown name, TypeError for an object without an itemsize."""
    if isinstance(dtype, str):
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"dtype is {dtype!r}: it must be a dtype or one of {', '.join(sorted(_ITEM_BYTES))}")
        return _ITEM_BYTES[dtype]
    item_bytes = getattr(dtype, "itemsize", None)
    if isinstance(dtype, type) or not isinstance(item_bytes, int) or item_bytes < 1:
        raise TypeError(f"dtype must be a torch dtype, such as torch.bfloat16, or its name, got {dtype!r}")
    return item_bytes


def integer(name: str, value: object) -> int:
    """Raises TypeError for anything but an integer, True and False included."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


def positive(name: str, value: object) -> int:
    """Raises TypeError for anything but an integer, ValueError below 1 or above 2^62."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    if number > _MAX_BYTES:
        raise ValueError(f"{name} must be at most 2^62, got {number}")
    return number


def in_range(name: str, value: object, least: int, most: int) -> int:
    """Raises TypeError for anything but an integer, ValueError outside of [least, most]."""
    number = integer(name, value)
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}: it must be from {least} to {most}")
    return number


def sizes(name: str, value: object) -> tuple[int, ...]:
    """A shape. Raises TypeError for anything but a sequence of integers, ValueError for negative ones."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}")
    return tuple(in_range(name, size, 0, _MAX_BYTES) for size in value)


def byte_count(name: str, value: object, least: int = 0) -> int:
    """Raises TypeError for anything but an integer, such as "1gb", ValueError below `least` or above 2^62."""
    try:
        number = integer(name, value)
    except TypeError:
        raise TypeError(f"{name} must be a number of bytes as an int, such as 1 << 30, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if number > _MAX_BYTES:
        raise ValueError(f"{name} must be at most 2^62 (the limit of address space), got {number}")
    return number


def flag(name: str, value: object) -> bool:
    """Raises TypeError for anything but True, False, 1 and 0."""
    if value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def share_of_one(name: str, value: object) -> float:
    """Raises TypeError for anything but a number, ValueError below 0 or above 1."""
    if not isinstance(value, SupportsFloat) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number from 0 to 1, got {value!r}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value}")
    return float(value)


def _kind_and_index(device: Any) -> tuple[str, int | None]:
    if isinstance(device, int) and not isinstance(device, bool):
        return "cuda", device
    if isinstance(device, str):
        kind, colon, number = device.partition(":")
        is_numbered = colon == "" or (number.isdecimal() and len(number) < 9)
        return (kind, int(number) if colon else None) if is_numbered else (device, None)
    return str(getattr(device, "type", "")), getattr(device, "index", None)


def _current_cuda_device() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_available() else 0
