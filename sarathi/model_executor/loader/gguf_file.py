"""The header of a GGUF file: key-value pairs and tensor locations. Needs neither torch nor the package gguf.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. Values are parsed
when asked for, and arrays of numbers in one go: an object for each element of a vocabulary takes seconds. Every length
and count is checked against the remaining bytes before it is used.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sarathi.model_executor.loader.reading import reading

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_SMALLEST_PAIR, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes
_MOST_DIMENSIONS = 4


class StoredTensor(NamedTuple):
    """Where a tensor lies: shape, outermost dimension first; ggml's number of its type; bytes from the file's start."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile(Mapping[str, Any]):
    """Key -> scalar, `str` or list of them; `tensors` by name. CheckpointError for a file that is not GGUF."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path, "GGUF file"), open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            cursor = _Cursor(self.data)
            num_tensors = cursor.begin()
            self._places: dict[str, tuple[int, int]] = {}
            for _ in range(cursor.count(_SMALLEST_PAIR)):
                self._add_place(cursor)
            self.tensors = self._read_tensors(cursor, num_tensors)

    def __getitem__(self, key: str) -> Any:
        kind, at = self._places[key]
        with reading(self.path, f"GGUF file at {key!r}"):
            return _Cursor(self.data, at).value(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _add_place(self, cursor: "_Cursor") -> None:
        key, kind = cursor.string(), cursor.unpack("I")[0]
        if key in self._places:
            raise ValueError(f"the key {key!r} occurs twice")
        self._places[key] = (kind, cursor.at)
        cursor.skip(kind)

    def _read_tensors(self, cursor: "_Cursor", count: int) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for _ in range(cursor.checked(count, _SMALLEST_TENSOR)):
            name, tensor = cursor.tensor()
            if name in tensors:
                raise ValueError(f"the tensor {name!r} occurs twice")
            tensors[name] = tensor
        start = -(-cursor.at // self._alignment()) * self._alignment()
        return {name: tensor._replace(offset=start + tensor.offset) for name, tensor in tensors.items()}

    def _alignment(self) -> int:
        alignment = self.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise ValueError(f"general.alignment is {alignment}; it must be from 1 to {2**20}")
        return alignment


class _Cursor:
    """A position in the header, which each read advances."""

    def __init__(self, data: mmap.mmap, at: int = 0) -> None:
        self._data, self._size = data, len(data)
        self.at = at

    def begin(self) -> int:
        """Reads magic and version; returns the number of tensors in the header."""
        if self._data[:4] != b"GGUF":
            raise ValueError(f"it starts with {self._data[:4]!r} instead of b'GGUF'")
        self.at = 4
        version, num_tensors = self.unpack("IQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, read are 2 and 3")
        return int(num_tensors)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def count(self, size: int) -> int:
        """Reads the number of the items that follow, of at least `size` bytes each."""
        return self.checked(self.unpack("Q")[0], size)

    def checked(self, count: int, size: int) -> int:
        if count * size > self._size - self.at:
            raise ValueError(f"{count} items of {size} bytes or more at {self.at} run past the end")
        return count

    def string(self) -> str:
        length = self.count(1)
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.unpack(_scalar(kind))[0]
        kind = self.unpack("I")[0]
        if kind == _STRING:
            return self._strings()
        layout = _scalar(kind)
        return list(self.unpack(f"{self.count(struct.calcsize('<' + layout))}{layout}"))

    def skip(self, kind: int) -> None:
        """Past a value."""
        if kind == _STRING:
            length = self.count(1)
            self.at += length
        elif kind != _ARRAY:
            self.unpack(_scalar(kind))
        else:
            self._skip_array(self.unpack("I")[0])

    def tensor(self) -> tuple[str, StoredTensor]:
        name, num_dimensions = self.string(), self.unpack("I")[0]
        if not 0 < num_dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {num_dimensions} dimensions; it must have 1 to 4")
        *innermost_first, kind, offset = self.unpack(f"{num_dimensions}QIQ")
        return name, StoredTensor(tuple(reversed(innermost_first)), kind, offset)

    def _skip_array(self, kind: int) -> None:
        if kind == _STRING:
            self._strings(keep=False)
            return
        size = struct.calcsize("<" + _scalar(kind))
        num_bytes = self.count(size) * size
        self.at += num_bytes

    def _strings(self, keep: bool = True) -> list[str]:
        """An array of strings; a vocabulary has 100,000, so that the loop is written out."""
        count, at, unpack, data = self.count(8), self.at, _LENGTH.unpack_from, self._data
        strings: list[str] = []
        for _ in range(count):
            start = at + 8
            at = start + unpack(data, at)[0]  # struct.error where a length lies past the end
            if keep:
                strings.append(data[start:at].decode("utf-8", errors="replace"))
        if at > self._size:
            raise ValueError(f"a string that ends at {at} runs past the end")
        self.at = at
        return strings


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"{kind} is no type of a value or of an array's elements")
    return _SCALARS[kind]
