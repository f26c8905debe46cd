"""The lengths and cache addresses of a step as int32 tensors on the device, copied from the host at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.messages import Chunk, PrefixGroup
from sarathi.model_executor.attention.address import Address, CacheLayer, SlotAddress
from sarathi.model_executor.attention.cascade import as_cascade, cascade_size, plan_cascade
from sarathi.model_executor.ops.types import CacheTarget, Cascade, CascadeShape

_ALIGNMENT = 4  # int32 numbers: Triton compiles another variant of a kernel for tensors not aligned to 16 bytes


class SlotTokens(NamedTuple):
    """A sequence on the host: its tokens, the step's included, are [slot, :length] of the cache."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """B sequences with T new tokens; int32 tensors on the device.

    Padding sequences have length 0, slot 0 and no new token, or in a decode step one that is not stored.
    """

    starts: Tensor  # [B + 1] index of each sequence's first new token among the T, then T
    cached: Tensor  # [B] tokens in the cache before the step
    lengths: Tensor  # [B] tokens in the cache after the step
    slots: Tensor | None  # [B]; None where paged
    block_table: Tensor | None  # [B, blocks]; None on slots
    num_tokens: int  # T
    max_new: int  # the most new tokens of a sequence
    max_length: int  # bound on lengths
    is_decode: bool  # every sequence has one new token: token i belongs to sequence i
    last: SlotTokens | None = None  # the last sequence; None where paged, and in steps whose tensors are refilled
    cascade: Cascade | None = None  # plan of tokens that decodes share; None: none are, or the kernel ignores it

    @property
    def is_slot_decode(self) -> bool:
        """Whether every sequence has one new token, in a slot."""
        return self.is_decode and self.slots is not None

    @property
    def only(self) -> SlotTokens | None:
        """The sequence, if the step has exactly one on a slot that the host knows."""
        return self.last if self.lengths.shape[0] == 1 else None


def make_step(chunks: Sequence[Chunk], address: Address, device: torch.device) -> DeviceStep:
    """The step of these chunks. The copy does not wait for the device."""
    counts = [chunk.num_tokens for chunk in chunks]
    blocks = 0 if isinstance(address, SlotAddress) else max(map(len, address.block_tables))
    packed = _pinned(_pack(chunks, address, len(counts), blocks), device).to(device, non_blocking=True)
    lengths = [chunk.start + chunk.num_tokens for chunk in chunks]
    last = SlotTokens(address.slots[-1], lengths[-1]) if isinstance(address, SlotAddress) else None
    step = _split(packed, len(counts), blocks, num_tokens=sum(counts), max_new=max(counts), max_length=max(lengths))
    return replace(step, last=last)


class StaticStep:
    """A decode step whose tensors stay in place: a CUDA graph captures `step`; call `fill` before each replay."""

    def __init__(
        self, batch_size: int, max_length: int, blocks: int, device: torch.device, *, extras: int = 0,
        cascade: CascadeShape | None = None,
    ) -> None:  # fmt: skip
        """batch_size: sequences, padding included. blocks: columns of the block table, 0 on slots.

        extras: number of further int32 vectors [batch_size] in the same copy; they are `extras`, [extras, batch_size].
        cascade: shape of the cascade plan; None: the step has none.
        """
        size = sum(map(_aligned, _counts(batch_size, blocks)))
        shared = size + (0 if cascade is None else cascade_size(batch_size, cascade))
        self._packed = torch.zeros(shared + extras * batch_size, dtype=torch.int32, device=device)
        self._batch_size, self._blocks, self._shape = batch_size, blocks, cascade
        self.extras = self._packed[shared:].view(extras, batch_size)
        step = _split(self._packed[:size], batch_size, blocks, num_tokens=batch_size, max_new=1, max_length=max_length)
        parts = None if cascade is None else as_cascade(self._packed[size:shared], batch_size, cascade)
        self.step = replace(step, cascade=parts)

    def fill(
        self, chunks: Sequence[Chunk], address: Address, extras: Sequence[int] = (),
        groups: Sequence[PrefixGroup] = (),
    ) -> None:  # fmt: skip
        """Set the step to at most batch_size chunks of one token each. extras: the vectors, padded, concatenated.

        groups: chunks that share tokens, for steps with a cascade.
        """
        numbers = _pack(chunks, address, self._batch_size, self._blocks)
        if self._shape is not None:
            numbers += plan_cascade(groups, address.slots, self._batch_size, self._shape)
        numbers += extras
        self._packed.copy_(_pinned(numbers, self._packed.device), non_blocking=True)


@dataclass(slots=True)
class StepMetadata:
    """A step, and the cache positions of its new tokens: computed by the first layer, shared by the others."""

    step: DeviceStep
    slot_mapping: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)

    def target(self, layer: CacheLayer) -> CacheTarget:
        """Where the step's keys and values of this layer are stored."""
        if self.slot_mapping is None:
            self.slot_mapping = slot_mapping(self.step, layer.k.shape[1])
        return CacheTarget(layer.k, layer.v, *self.slot_mapping)


def with_cascade(
    step: DeviceStep, groups: Sequence[PrefixGroup], slots: Sequence[int], decodes: int, shape: CascadeShape
) -> DeviceStep:
    """The step with a cascade plan for its first `decodes` sequences, by another copy. groups: of all sequences."""
    leading = [group._replace(members=tuple(m for m in group.members if m < decodes)) for group in groups]
    kept = [group for group in leading if len(group.members) > 1]
    if not kept:
        return step
    device, num_seqs = step.lengths.device, step.lengths.shape[0]
    packed = _pinned(plan_cascade(kept, slots, num_seqs, shape), device).to(device, non_blocking=True)
    return replace(step, cascade=as_cascade(packed, num_seqs, shape))


def first_decodes(step: DeviceStep, count: int) -> DeviceStep:
    """The step of the first `count` sequences, which have one new token each. Device work only."""
    slots = None if step.slots is None else step.slots[:count]
    table = None if step.block_table is None else step.block_table[:count]
    return DeviceStep(
        step.starts[: count + 1], step.cached[:count], step.lengths[:count], slots, table,
        num_tokens=count, max_new=1, max_length=step.max_length, is_decode=True, cascade=step.cascade,
    )  # fmt: skip


def rest_of(step: DeviceStep, count: int) -> DeviceStep:
    """The step without its first `count` sequences, which have one new token each. Device work only."""
    slots = None if step.slots is None else step.slots[count:]
    table = None if step.block_table is None else step.block_table[count:]
    return DeviceStep(
        step.starts[count:] - count, step.cached[count:], step.lengths[count:], slots, table,
        num_tokens=step.num_tokens - count, max_new=step.max_new, max_length=step.max_length, is_decode=False,
        last=step.last,
    )  # fmt: skip


def slot_mapping(step: DeviceStep, block_size: int) -> tuple[Tensor, Tensor]:
    """Slot (or block) and column in it of each new token, [T] int32 each; slot -1 for padding. Device work only."""
    if step.is_decode:
        positions, owners = step.cached, None
    else:
        sequences = torch.arange(step.cached.shape[0], device=step.starts.device)
        owners = torch.repeat_interleave(sequences, step.starts.diff(), output_size=step.num_tokens)
        positions = torch.arange(step.num_tokens, device=owners.device, dtype=torch.int32)
        positions = positions + (step.cached - step.starts[:-1])[owners]
    slots, columns = _locate(step, positions, owners, block_size)
    lengths = step.lengths if owners is None else step.lengths[owners]
    return torch.where(lengths > 0, slots, -1), columns


def _locate(step: DeviceStep, positions: Tensor, owners: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """positions: [T] of the tokens in their sequences; owners: [T] index of the sequence, None where it is [0, T)."""
    if step.block_table is None:
        assert step.slots is not None
        return (step.slots if owners is None else step.slots[owners]), positions
    table = step.block_table if owners is None else step.block_table[owners]
    block = torch.div(positions, block_size, rounding_mode="floor").long()
    return table.gather(1, block[:, None])[:, 0], positions % block_size


def _counts(batch_size: int, blocks: int) -> tuple[int, int, int, int]:
    """The sizes of starts, cached, lengths, and slots or the block table."""
    return batch_size + 1, batch_size, batch_size, batch_size * (blocks or 1)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _pack(chunks: Sequence[Chunk], address: Address, batch_size: int, blocks: int) -> list[int]:
    """starts, cached, lengths, and slots or the block table; each padded to batch_size and aligned."""
    starts, cached, lengths = [0], [], []
    for chunk in chunks:
        starts.append(starts[-1] + chunk.num_tokens)
        cached.append(chunk.start)
        lengths.append(chunk.start + chunk.num_tokens)
    entries = list(address.slots) if isinstance(address, SlotAddress) else _table(address.block_tables, blocks)
    numbers: list[int] = []
    parts = ((starts, starts[-1]), (cached, 0), (lengths, 0), (entries, 0))
    for (part, padding), count in zip(parts, _counts(batch_size, blocks), strict=True):
        numbers += part
        numbers += [padding] * (_aligned(count) - len(part))
    return numbers


def _table(tables: Sequence[Sequence[int]], blocks: int) -> list[int]:
    """The tables, cut or padded to `blocks` columns each."""
    table: list[int] = []
    for row in tables:
        table += row[:blocks]
        table += [0] * (blocks - len(row))
    return table


def _split(
    packed: Tensor, batch_size: int, blocks: int, *, num_tokens: int, max_new: int, max_length: int
) -> DeviceStep:
    counts = _counts(batch_size, blocks)
    parts = torch.split(packed, [_aligned(count) for count in counts])
    starts, cached, lengths, entries = (part[:count] for part, count in zip(parts, counts, strict=True))
    slots, table = (None, entries.view(batch_size, blocks)) if blocks else (entries, None)
    is_decode = max_new == 1 and num_tokens == batch_size
    return DeviceStep(starts, cached, lengths, slots, table, num_tokens, max_new, max_length, is_decode)


def _pinned(numbers: list[int], device: torch.device) -> Tensor:
    """A tensor on the host, pinned for CUDA: a copy from pinned memory does not wait for the device."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
