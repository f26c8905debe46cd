"""A step's lengths and places as int32 tensors on the device, by one copy from the host. Knows no kernel."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.attention.address import Address, CacheLayer, SlotAddress
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops.types import CacheTarget

_ALIGNMENT = 4  # int32 numbers: kernels are compiled once for tensors that begin so, and once more for others


class Home(NamedTuple):
    """Where a sequence lies, known to the host: its tokens, those of the step included, are [slot, :length]."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """B sequences with T new tokens; int32 tensors on the device.

    Padding (B larger than the batch): no new tokens (one_each: one that is stored nowhere), length 0, row 0.
    """

    starts: Tensor  # [B + 1] where each sequence's new tokens begin among the T, then T
    cached: Tensor  # [B] tokens in the cache before the step
    lengths: Tensor  # [B] and after it
    rows: Tensor | None  # [B] slots; None where paged
    block_table: Tensor | None  # [B, blocks]; None where contiguous
    num_tokens: int
    max_new: int
    max_length: int
    one_each: bool  # every sequence has one new token: token i is sequence i's
    last: Home | None = None  # of the last sequence; None where paged, and in steps that are kept and filled again

    @property
    def is_slot_decode(self) -> bool:
        """Whether every sequence has one new token, in a contiguous slot."""
        return self.one_each and self.rows is not None

    @property
    def only(self) -> Home | None:
        """Of a step's one sequence."""
        return self.last if self.lengths.shape[0] == 1 else None


def make_step(batch: Batch, address: Address, device: torch.device) -> DeviceStep:
    """The batch's step; the copy does not wait for the device."""
    counts = [chunk.num_tokens for chunk in batch.chunks]
    blocks = 0 if isinstance(address, SlotAddress) else max(map(len, address.block_tables))
    packed = _to_device(_pack(batch, address, len(counts), blocks), device)
    lengths = [chunk.start + chunk.num_tokens for chunk in batch.chunks]
    last = Home(address.slots[-1], lengths[-1]) if isinstance(address, SlotAddress) else None
    step = _split(packed, len(counts), blocks, num_tokens=sum(counts), max_new=max(counts), max_length=max(lengths))
    return replace(step, last=last)


class StaticStep:
    """A decode step whose tensors stay where they are: a CUDA graph captures `step`; `fill` before each replay."""

    def __init__(self, batch_size: int, max_length: int, blocks: int, device: torch.device, *, riders: int = 0) -> None:
        """batch_size: sequences, padding included. blocks: columns of the block table, 0 where contiguous.

        riders: further numbers of each sequence that travel in the same copy, to `riders`, [riders, batch_size] int32.
        """
        size = sum(map(_aligned, _counts(batch_size, blocks)))
        self._packed = torch.zeros(size + riders * batch_size, dtype=torch.int32, device=device)
        self._batch_size, self._blocks = batch_size, blocks
        self.riders = self._packed[size:].view(riders, batch_size)
        self.step = _split(
            self._packed[:size], batch_size, blocks, num_tokens=batch_size, max_new=1, max_length=max_length
        )

    def fill(self, batch: Batch, address: Address, riders: Sequence[int] = ()) -> None:
        """The numbers of this step: one new token for each of at most batch_size sequences; riders: all, padded."""
        numbers = [*_pack(batch, address, self._batch_size, self._blocks), *riders]
        self._packed.copy_(_pinned(numbers, self._packed.device), non_blocking=True)


@dataclass(slots=True)
class StepMetadata:
    """A step, and where its new tokens are stored: computed by the first layer, shared by the others."""

    step: DeviceStep
    places: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)

    def target(self, layer: CacheLayer) -> CacheTarget:
        """Where the step's keys and values of this layer go."""
        if self.places is None:
            self.places = token_places(self.step, layer.k.shape[1])
        return CacheTarget(layer.k, layer.v, *self.places)


def first_decodes(step: DeviceStep, count: int) -> DeviceStep:
    """The step of the first `count` sequences, which have one new token each."""
    rows = None if step.rows is None else step.rows[:count]
    table = None if step.block_table is None else step.block_table[:count]
    return DeviceStep(
        step.starts[: count + 1], step.cached[:count], step.lengths[:count], rows, table,
        num_tokens=count, max_new=1, max_length=step.max_length, one_each=True,
    )  # fmt: skip


def rest_of(step: DeviceStep, count: int) -> DeviceStep:
    """The step of all sequences but the first `count`, which have one new token each. Device work only."""
    rows = None if step.rows is None else step.rows[count:]
    table = None if step.block_table is None else step.block_table[count:]
    return DeviceStep(
        step.starts[count:] - count, step.cached[count:], step.lengths[count:], rows, table,
        num_tokens=step.num_tokens - count, max_new=step.max_new, max_length=step.max_length, one_each=False,
        last=step.last,
    )  # fmt: skip


def token_places(step: DeviceStep, block_size: int) -> tuple[Tensor, Tensor]:
    """(rows, cols), [T] int32, where the new tokens' keys and values go; row -1 for padding. Device work only."""
    if step.one_each:
        positions, owners = step.cached, None
    else:
        sequences = torch.arange(step.cached.shape[0], device=step.starts.device)
        owners = torch.repeat_interleave(sequences, step.starts.diff(), output_size=step.num_tokens)
        positions = torch.arange(step.num_tokens, device=owners.device, dtype=torch.int32)
        positions = positions + (step.cached - step.starts[:-1])[owners]
    rows, cols = _place(step, positions, owners, block_size)
    lengths = step.lengths if owners is None else step.lengths[owners]
    return torch.where(lengths > 0, rows, -1), cols


def _place(step: DeviceStep, positions: Tensor, owners: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    if step.block_table is None:
        assert step.rows is not None
        return (step.rows if owners is None else step.rows[owners]), positions
    table = step.block_table if owners is None else step.block_table[owners]
    block = torch.div(positions, block_size, rounding_mode="floor").long()
    return table.gather(1, block[:, None])[:, 0], positions % block_size


def _counts(batch_size: int, blocks: int) -> tuple[int, int, int, int]:
    """How many numbers are starts, cached, lengths, and rows or the block table."""
    return batch_size + 1, batch_size, batch_size, batch_size * (blocks or 1)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _pack(batch: Batch, address: Address, batch_size: int, blocks: int) -> list[int]:
    """starts, cached, lengths, rows or block table, each padded to batch_size, and on to where the next may begin."""
    starts, cached, lengths = [0], [], []
    for chunk in batch.chunks:
        starts.append(starts[-1] + chunk.num_tokens)
        cached.append(chunk.start)
        lengths.append(chunk.start + chunk.num_tokens)
    places = list(address.slots) if isinstance(address, SlotAddress) else _table(address.block_tables, blocks)
    numbers: list[int] = []
    parts = ((starts, starts[-1]), (cached, 0), (lengths, 0), (places, 0))
    for (part, padding), count in zip(parts, _counts(batch_size, blocks), strict=True):
        numbers += part
        numbers += [padding] * (_aligned(count) - len(part))
    return numbers


def _table(tables: Sequence[Sequence[int]], blocks: int) -> list[int]:
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
    starts, cached, lengths, places = (part[:count] for part, count in zip(parts, counts, strict=True))
    rows, table = (None, places.view(batch_size, blocks)) if blocks else (places, None)
    one_each = max_new == 1 and num_tokens == batch_size
    return DeviceStep(starts, cached, lengths, rows, table, num_tokens, max_new, max_length, one_each)


def _to_device(numbers: list[int], device: torch.device) -> Tensor:
    return _pinned(numbers, device).to(device, non_blocking=True)


def _pinned(numbers: list[int], device: torch.device) -> Tensor:
    """On the host; pinned where the copy to the device is to return at once."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
