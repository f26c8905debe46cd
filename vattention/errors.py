"""The exceptions of the library. The native module raises these very classes."""

from __future__ import annotations


class VAttentionError(Exception):
    """Base of everything the library raises that is not a wrong argument (those are ValueError and TypeError)."""


class OutOfMemoryError(VAttentionError, MemoryError):
    """Active slots need more rows than there are; nothing was changed.

    `needed` and `available` are rows and count all active slots, not only those of the failed call.
    """

    def __init__(self, message: str, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[str, int, int]]:
        return type(self), (str(self), self.needed, self.available)


class NoFreeSlotError(VAttentionError):
    """Every slot is in use."""


class DeviceError(VAttentionError):
    """A call of the device failed; the message names the call and repeats the device's own text."""


class ForkError(VAttentionError):
    """The cache belongs to the process that this one was forked from; only `close` may be called here."""


class IntegrityError(VAttentionError):
    """`check_integrity` found the books in disagreement: a defect of the allocator, not of its user."""
