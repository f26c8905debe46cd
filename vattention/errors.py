"""The exceptions of the library; the native module raises them too."""

from __future__ import annotations


class VAttentionError(Exception):
    """Base of all errors but wrong arguments, which are ValueError and TypeError."""


class OutOfMemoryError(VAttentionError, MemoryError):
    """Active slots need more rows than are available; nothing was changed.

    `needed` and `available` count rows of all active slots, not only those of the failed call.
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
    """A call of the device failed; the message names it and has the device's own text."""


class ForkError(VAttentionError):
    """The cache belongs to the parent of this forked process; only `close` may be called here."""


class IntegrityError(VAttentionError):
    """`check_integrity` found inconsistent accounting: a defect of the allocator, not of its user."""
