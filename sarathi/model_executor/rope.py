"""Rotary position embedding (Su et al., 2021): the frequencies by which queries and keys are rotated.

The arithmetic follows transformers 5 operation by operation in float32: at position 100,000 a frequency that differs in
its last bit is an angle that differs by 6e-3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sarathi.model_executor.ops.types import RopeTable


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies theta^(-2i/D), then scaled. At a position the angle is position x frequency; D is the head size.

    kind: "default"; "linear" divides all by `factor`; "llama3" divides those that make fewer than `low_freq_factor`
        turns in `original_max_positions`, keeps those with more than `high_freq_factor`, and blends between; "yarn"
        blends likewise between `beta_slow` and `beta_fast` turns, in the index i (Peng et al., 2023); "dynamic" raises
        theta with the length of the text, `factor` times the original length at most being meant; "longrope" divides
        by `divisors` [D/2] up to the original length, and by `long_divisors` [D/2] in longer texts; "divided" always
        by `divisors`.
    attention_factor: cosines and sines are multiplied by it (yarn, longrope).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether texts longer than `original_max_positions` have frequencies of their own."""
        return self.kind in ("dynamic", "longrope")


class RopeFrequencies:
    """Radians per position: [D/2] float32 for texts up to the original length, and beyond it by length.

    Frequencies that depend on length use a token's rope length, max(tokens of its prompt, its position + 1). So prompts
    get the angles of one forward call of transformers, output tokens those of its `generate` with a cache, and cached
    keys are never rotated again. The length depends on the request alone: chunks, batches, preemption and
    recomputation do not change it. docs/models.md lists the differences.
    """

    def __init__(self, rope: Rope, head_size: int, device: torch.device | str = "cpu") -> None:
        self.rope, self._head_size = rope, head_size
        periods = _periods(rope.theta, head_size)
        self.base = _scaled(periods, rope, head_size).to(device)
        self._long = 1.0 / (torch.tensor(rope.long_divisors or 1.0) * periods).to(device)

    def cos_sin(self, positions: Tensor, lengths: Tensor | None = None) -> RopeTable:
        """Cosines and sines of T tokens times the attention factor, [T, D/2] float32 each.

        positions, lengths: [T] integers; rope lengths are needed only where `rope.depends_on_length`.
        """
        if self.rope.depends_on_length and lengths is not None:
            angles = positions.float()[:, None] * self._of_lengths(lengths)
        else:
            angles = torch.outer(positions.float(), self.base)
        return RopeTable(angles.cos() * self.rope.attention_factor, angles.sin() * self.rope.attention_factor)

    def table(self, max_positions: int) -> RopeTable:
        """[max_positions, D/2] by position, for kernels that look angles up.

        Raises ValueError if texts of that length need frequencies that depend on their length.
        """
        original = self.rope.original_max_positions
        if self.rope.depends_on_length and max_positions > original:
            raise ValueError(
                f"max_model_len={max_positions}: rope scaling {self.rope.kind!r} changes beyond {original} tokens, "
                f"which this device cannot follow; set max_model_len to at most {original}, or device='cpu'"
            )
        return self.cos_sin(torch.arange(max_positions, device=self.base.device))

    def _of_lengths(self, lengths: Tensor) -> Tensor:
        """[T, D/2]: the frequencies of texts of these lengths."""
        rope, original = self.rope, self.rope.original_max_positions
        if rope.kind == "longrope":
            return torch.where(lengths[:, None] > original, self._long, self.base)
        stretch = (rope.factor * lengths.clamp(min=original) / original) - (rope.factor - 1)
        theta = rope.theta * stretch ** (self._head_size / (self._head_size - 2))
        return 1.0 / _periods(theta[:, None], self._head_size)


def _periods(theta: float | Tensor, head_size: int) -> Tensor:
    """theta^(2i/D): positions per radian, [..., D/2]."""
    device = theta.device if isinstance(theta, Tensor) else None
    return theta ** (torch.arange(0, head_size, 2, dtype=torch.int64, device=device).float() / head_size)


def _scaled(periods: Tensor, rope: Rope, head_size: int) -> Tensor:
    """Frequencies of texts up to the original length."""
    base = 1.0 / periods
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _blend_llama3(base, rope)
    if rope.kind == "yarn":
        return _blend_yarn(periods, rope, head_size)
    if rope.kind == "divided":
        return base / torch.tensor(rope.divisors)
    return 1.0 / (torch.tensor(rope.divisors) * periods) if rope.kind == "longrope" else base


def _blend_llama3(base: Tensor, rope: Rope) -> Tensor:
    """Divide low frequencies, keep high ones, and interpolate between them by turns."""
    turns = rope.original_max_positions * base / (2 * math.pi)  # over the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * base / rope.factor + kept * base


def _blend_yarn(periods: Tensor, rope: Rope, head_size: int) -> Tensor:
    """Likewise, interpolated linearly in the index i between the frequencies with beta_fast and beta_slow turns."""
    first, last = (_index_of_turns(turns, rope, head_size) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    width = last - first or 0.001
    kept = 1 - ((torch.arange(head_size // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _index_of_turns(turns: float, rope: Rope, head_size: int) -> float:
    """The (fractional) i whose frequency makes this many turns over the original context."""
    wavelengths = rope.original_max_positions / (turns * 2 * math.pi)
    return head_size * math.log(wavelengths) / (2 * math.log(rope.theta))
