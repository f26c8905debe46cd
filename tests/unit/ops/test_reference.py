"""The torch twins against formulas written another way."""

import random

import pytest
import torch
from torch import Tensor

from sarathi.model_executor.ops import create_ops
from sarathi.model_executor.ops.native.decode_attention import decode_attention
from sarathi.model_executor.ops.native.rope import apply_rope
from sarathi.model_executor.ops.types import CacheTarget, DecodeBatch, RotationTable

KERNELS = create_ops(torch.device("cpu"))


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def test_rms_norm_is_a_projection_to_the_sphere() -> None:
    x, weight = torch.randn(7, 48, dtype=torch.float64), torch.rand(48, dtype=torch.float64)
    normed = KERNELS.rms_norm(x, weight, 0.0)
    expected = x / x.norm(dim=-1, keepdim=True) * 48**0.5 * weight
    torch.testing.assert_close(normed, expected, rtol=1e-6, atol=1e-6)  # the mean is float32 by contract


def test_add_rms_norm_updates_the_residual() -> None:
    x, residual, weight = torch.randn(3, 32), torch.randn(3, 32), torch.rand(32)
    total = x + residual
    normed = KERNELS.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(total, (32,), weight, 1e-6))


def test_rope_turns_pairs_as_complex_numbers() -> None:
    angles = torch.rand(20, 12) * 6.28
    q, k = torch.randn(5, 3, 32), torch.randn(5, 2, 32)
    positions = torch.randint(0, 20, (5,))
    expected = [turn(x, angles[positions]) for x in (q, k)]
    apply_rope(q, k, positions, RotationTable(angles.cos(), angles.sin()))
    torch.testing.assert_close([q, k], expected)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    half = angles.shape[1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def test_store_skips_padding() -> None:
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    keys, values = torch.full((3, 6, 2, 8), -1.0), torch.full((3, 6, 2, 8), -1.0)
    KERNELS.store(k, v, CacheTarget(keys, values, torch.tensor([2, -1, 0, 2]), torch.tensor([5, 0, 1, 4])))
    torch.testing.assert_close(keys[[2, 0, 2], [5, 1, 4]], k[[0, 2, 3]])
    torch.testing.assert_close(values[[2, 0, 2], [5, 1, 4]], v[[0, 2, 3]])
    assert (keys == -1.0).sum() == keys.numel() - 3 * 16


@pytest.mark.parametrize("window", [None, 1, 9])
def test_decode_attention_is_causal_attention_of_the_last_token(window: int | None) -> None:
    cache = torch.full((2, 5, 40, 2, 16), float("nan"))
    slots, lengths = torch.tensor([3, 0, 4]), torch.tensor([40, 1, 17])
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        cache[:, slot, :length] = torch.randn(2, length, 2, 16)
    q = torch.randn(3, 6, 16)
    out = decode_attention(q, cache[0], cache[1], DecodeBatch(slots, lengths, window), 0.25)
    for index, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        seen = cache[:, slot, max(0, length - (window or length)) : length].transpose(1, 2)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[index, :, None], seen[0], seen[1], scale=0.25, enable_gqa=True
        )
        torch.testing.assert_close(out[index], expected[:, 0])


def test_decode_attention_of_padding_is_zero() -> None:
    cache = torch.full((1, 4, 1, 8), float("nan"))
    batch = DecodeBatch(torch.tensor([0]), torch.tensor([0]))
    assert decode_attention(torch.randn(1, 2, 8), cache, cache, batch, 1.0).abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_argmax_is_torchs(dtype: torch.dtype) -> None:
    """The lowest of equals, NaN as the largest, whatever the strides."""
    logits = torch.randn(5, 2000).to(dtype)[:, ::2]
    logits[0, 7], logits[0, 700], logits[1, 9], logits[2] = 90.0, 90.0, float("nan"), float("-inf")
    for rows in (logits, logits[:0]):
        found = KERNELS.argmax(rows)
        assert found.dtype == torch.int64 and torch.equal(found, rows.argmax(-1))
    assert KERNELS.argmax(logits)[:3].tolist() == [7, 9, 0]
