"""Key-value header of a GGUF file in a tenth of a second; knows nothing of tensors, tokenizers or models.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. The `gguf` package
builds one object for each element of each array, which takes seconds for a vocabulary; here arrays are read in one go.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFFormatError(ValueError):
    """The file is not a GGUF file, is cut short, or is of a version that is not read here."""


def read_metadata(path: str | Path) -> dict[str, Any]:
    """All key-value pairs of the header: scalars, `str`, or lists of them. GGUFFormatError for a file that is none."""
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data).pairs()
        except (struct.error, ValueError, KeyError) as error:
            raise GGUFFormatError(f"{path} cannot be read as GGUF: {error}") from error


class _Cursor:
    """A position in the header that moves past what it reads."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def pairs(self) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise ValueError(f"it starts with {self._data[:4]!r} instead of b'GGUF'")
        self._at = 4
        version, _num_tensors, num_pairs = self._unpack("IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, read are 2 and 3")
        return {self._string(): self._value(*self._unpack("I")) for _ in range(num_pairs)}

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._data, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        if self._at + length > len(self._data):
            raise ValueError(f"a string of {length} bytes at {self._at} runs past the end")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(*self._unpack("IQ"))
        return self._unpack(_SCALARS[kind])[0]

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind in _SCALARS:
            return list(self._unpack(f"{count}{_SCALARS[kind]}"))
        return [self._value(kind) for _ in range(count)]
