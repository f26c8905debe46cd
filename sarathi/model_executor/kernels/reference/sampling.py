"""Torch twins of the sampling kernels, with the same counter-based noise. Knows nothing of requests."""

import torch
from torch import Tensor

from sarathi.model_executor.kernels.types import NoiseKey

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_HEAD_SIZE = 1024  # how many of the likeliest tokens are sorted before all of them are
_ROUNDS = 7  # enough to pass BigCrush (Salmon et al., 2011, table 2)


def argmax(logits: Tensor) -> Tensor:
    """The lowest index of the largest logit. logits: [num_rows, vocab_size]. Returns [num_rows] int64."""
    return logits.argmax(dim=-1)


def keep_argmax(logits: Tensor, homes: Tensor, newest: Tensor) -> Tensor:
    """``argmax``, which is also written to ``newest[homes]``. homes: [num_rows] int32; newest: [homes] int64."""
    tokens = argmax(logits)
    newest[homes.long()] = tokens
    return tokens


def sample(logits: Tensor, temperatures: Tensor, key: NoiseKey) -> Tensor:
    """Draws one token a row from ``softmax(logits / temperature)`` by the Gumbel-max rule; temperature 0 is argmax.

    logits: [num_rows, vocab_size], excluded tokens at -inf; temperatures: [num_rows] float32.
    The noise of (seed, position, token) is a counter-based hash, so a row's draw does not depend on its batch.
    """
    noise = -exponential_noise(key, logits.shape[-1]).log()
    warm = temperatures[:, None] > 0
    scale = torch.where(warm, temperatures[:, None], 1.0)
    return (logits.float() / scale + torch.where(warm, noise, 0.0)).argmax(dim=-1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by inverting ``softmax(logits)``: the first at which the sum of probabilities exceeds `uniform`.

    logits: [num_rows, vocab_size] float32, excluded tokens at -inf; uniform: [num_rows, 1] float64 in [0, 1).
    Returns [num_rows] int64.
    """
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniform * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return drawn.clamp_(max=logits.shape[-1] - 1)


def nucleus_floor(logits: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit of the fewest likeliest tokens that together reach top_p (Holtzman et al., 2020).

    logits: [num_rows, vocab_size] float32; top_p: [num_rows, 1] float32. Returns [num_rows, 1], -inf for a top_p of 1.
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    for size in (min(_HEAD_SIZE, logits.shape[-1]), logits.shape[-1]):
        largest = logits.topk(size, dim=-1).values
        probabilities = (largest - total).exp()
        reached = probabilities.cumsum(dim=-1)
        if bool((reached[:, -1:] >= top_p)[top_p < 1.0].all()):
            break
    inside = reached - probabilities < top_p  # what came before had not reached it yet
    floor = largest.masked_fill(~inside, float("inf")).amin(dim=-1, keepdim=True)
    return torch.where(top_p < 1.0, floor, float("-inf"))


def exponential_noise(key: NoiseKey, vocab_size: int) -> Tensor:
    """Exponential(1) variates, [num_rows, vocab_size] float32: row r is a function of the key of row r alone."""
    bits = _philox(key, vocab_size)
    uniform = (bits.float() + 0.5) * 2.0**-32
    # -log(1 - u), as a series where the subtraction would lose the digits that decide between unlikely tokens.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    return torch.where(uniform < 2.0**-8, series, -torch.log(torch.clamp(1.0 - uniform, min=2.0**-24)))


def _philox(key: NoiseKey, vocab_size: int) -> Tensor:
    """First word of Philox4x32 with counter (token, position low, position high, 0), as int64 in [0, 2**32)."""
    tokens = torch.arange(vocab_size, device=key.seeds.device)[None, :]
    zeros = torch.zeros_like(tokens + key.seeds[:, None])
    low, high = key.positions[:, None] & _MASK, (key.positions[:, None] >> 32) & _MASK
    counter = [zeros + tokens, zeros + low, zeros + high, zeros]
    keys = [key.seeds[:, None] & _MASK, (key.seeds[:, None] >> 32) & _MASK]
    for _ in range(_ROUNDS):
        counter = _round(counter, keys)
        keys = [(k + weyl) & _MASK for k, weyl in zip(keys, _WEYL, strict=True)]
    return counter[0]


def _round(counter: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
    products = [_MULTIPLIERS[0] * counter[0], _MULTIPLIERS[1] * counter[2]]  # wraps in 64 bits: both halves stay exact
    high = [(product >> 32) & _MASK for product in products]
    low = [product & _MASK for product in products]
    return [high[1] ^ counter[1] ^ keys[0], low[1], high[0] ^ counter[3] ^ keys[1], low[0]]
