r"""An attention backend's name: the product of kernel, memory, layout, mapping and granularity.

fa_vattn_megacache_sync_2mb
|  |     |         |    \-- page of virtual memory (64kb, 2mb), or tokens of a block where paged (16)
|  |     |         \------- map pages in the step, not in the background (vattn)
|  |     \----------------- all layers of K in one region, all of V in another (vattn)
|  \----------------------- vattn: contiguous virtual memory; paged: block tables
\-------------------------- sdpa, fa (the best installed), fa2, fa3, fa4, fi (FlashInfer), no_op (computes nothing)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sarathi.config.units import format_bytes, nearest, parse_bytes
from sarathi.wording import short_repr

AUTO = "auto"
KERNELS = ("sdpa", "fa", "fa2", "fa3", "fa4", "fi", "no_op")
MEMORIES = ("vattn", "paged")
_FLAGS = ("megacache", "sync")
_KNOWN_WORDS = (*KERNELS, *MEMORIES, *_FLAGS)
_NOT_SUPPORTED = {
    "pod": "POD-Attention's kernel of prefill and decode together; fa_vattn computes a mixed step in one call",
    "streams": "prefill and decode on two CUDA streams; fa_vattn computes a mixed step in one call",
    "unpaged": "a cache that is copied together in each step; fi_vattn gives FlashInfer contiguous memory",
}
_NO_CHOICES = (False, False, None, None)
_SIZE_WORD = re.compile(r"(\d+)([a-z]*)")
_MOST_PAGE_BYTES, _MOST_BLOCK_TOKENS = 2**40, 2**31 - 1


class BackendNameError(ValueError):
    """An unknown or contradictory backend name; the message says what is allowed."""


@dataclass(frozen=True)
class BackendSpec:
    """One backend. `BackendSpec.parse(str(spec)) == spec` for every spec that can be built.

    kernel: one of KERNELS; "auto", which takes no other choice, is resolved per device by `on`.
    page_bytes: page of virtual memory, a multiple of 1 KiB; None leaves it to the device's granularity.
    block_size: tokens of a block where paged; None leaves it to the kernel.
    """

    kernel: str = AUTO
    memory: str = "vattn"
    megacache: bool = False
    sync: bool = False
    page_bytes: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.kernel == AUTO:
            self._check_auto()
            return
        _check_word("kernel", self.kernel, KERNELS)
        _check_word("memory", self.memory, MEMORIES)
        if self.is_paged:
            self._check_paged()
        else:
            self._check_vattn()

    @classmethod
    def parse(cls, name: str) -> BackendSpec:
        """Read a name in any case, with its words in any order; BackendNameError says what is wrong with it."""
        if name.strip().lower() == AUTO:
            return cls()
        fields: dict[str, Any] = {}
        for word in _words(name):
            axis, value = _read_word(name, word)
            if axis in fields:
                raise BackendNameError(f"backend {name!r} gives its {axis} twice: the second time with {word!r}")
            fields[axis] = value
        try:
            return cls(**_place_size(_complete(fields)))
        except BackendNameError as error:
            raise BackendNameError(f"backend {name!r}: {error}") from None

    @property
    def is_paged(self) -> bool:
        return self.memory == "paged"

    def on(self, device_kind: str) -> BackendSpec:
        """This backend on a device of this kind, "cpu" or "cuda": "auto" becomes the fastest common one."""
        if self.kernel != AUTO:
            return self
        return BackendSpec("sdpa") if device_kind == "cpu" else BackendSpec("fa", megacache=True)

    def __str__(self) -> str:
        if self.kernel == AUTO:
            return AUTO
        words = [self.kernel, self.memory, *(flag for flag in _FLAGS if getattr(self, flag))]
        if self.page_bytes is not None:
            words.append(format_bytes(self.page_bytes))
        if self.block_size is not None:
            words.append(str(self.block_size))
        return "_".join(words)

    def _check_auto(self) -> None:
        if (self.memory, self.megacache, self.sync, self.page_bytes, self.block_size) != ("vattn", *_NO_CHOICES):
            raise BackendNameError("kernel 'auto' takes no other choice: name a kernel")

    def _check_paged(self) -> None:
        if self.megacache:
            raise BackendNameError("megacache is a layout of virtual memory; block tables (paged) have no use for it")
        if self.sync:
            raise BackendNameError("sync says when virtual memory is mapped; blocks (paged) are never mapped")
        if self.page_bytes is not None:
            raise BackendNameError(
                f"a block is counted in tokens (as _16), not in bytes (_{format_bytes(self.page_bytes)}), where paged"
            )
        if self.block_size is not None and not 1 <= self.block_size <= _MOST_BLOCK_TOKENS:
            raise BackendNameError(f"a block of {self.block_size} tokens: it must hold 1 to {_MOST_BLOCK_TOKENS}")

    def _check_vattn(self) -> None:
        if self.block_size is not None:
            raise BackendNameError(
                f"virtual memory has pages of bytes (as _64kb or _2mb), not blocks of {self.block_size} tokens"
            )
        if self.page_bytes is not None and (not 1024 <= self.page_bytes <= _MOST_PAGE_BYTES or self.page_bytes % 1024):
            most = format_bytes(_MOST_PAGE_BYTES)
            raise BackendNameError(f"a page of {self.page_bytes} bytes: it must be a multiple of 1kb, up to {most}")


def _words(name: str) -> Iterator[str]:
    words = name.strip().lower().split("_")
    while words:
        word = words.pop(0)
        if word == "no" and words[:1] == ["op"]:
            word = f"no_{words.pop(0)}"
        yield word


def _read_word(name: str, word: str) -> tuple[str, object]:
    if word in KERNELS:
        return "kernel", word
    if word in MEMORIES:
        return "memory", word
    if word in _FLAGS:
        return word, True
    if size := _SIZE_WORD.fullmatch(word):
        return "size", _read_size(name, word, unit=size[2])
    if word in _NOT_SUPPORTED:
        raise BackendNameError(f"backend {name!r}: {word!r} is not supported: it is {_NOT_SUPPORTED[word]}")
    raise BackendNameError(
        f"backend {name!r}: {word!r} is unknown; the nearest known word is {nearest(word, _KNOWN_WORDS)!r}. "
        f"A name is a kernel ({', '.join(KERNELS)}), a memory ({', '.join(MEMORIES)}), "
        "and, as wanted, megacache, sync and a size"
    )


def _read_size(name: str, word: str, unit: str) -> tuple[str, int]:
    try:
        return "page_bytes" if unit else "block_size", parse_bytes(word)
    except ValueError as error:
        raise BackendNameError(f"backend {short_repr(name)}: {error}") from None


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Check that kernel and memory are named; no_op alone means no_op_vattn."""
    if "kernel" not in fields:
        raise BackendNameError(f"no kernel is named; known are {', '.join(KERNELS)}")
    if fields["kernel"] == "no_op":
        fields.setdefault("memory", "vattn")
    if "memory" not in fields:
        raise BackendNameError("no memory is named: write {0}_vattn or {0}_paged".format(fields["kernel"]))
    return fields


def _place_size(fields: dict[str, Any]) -> dict[str, Any]:
    size = fields.pop("size", None)
    if size is not None:
        axis, value = size
        fields[axis] = value
    return fields


def _check_word(axis: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise BackendNameError(
            f"{axis} {word!r} is not one of {', '.join(known)}; the nearest is {nearest(word, known)!r}"
        )
