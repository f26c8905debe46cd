"""The torch operations against formulas written another way."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sarathi.model_executor.ops import create_ops
from sarathi.model_executor.ops.native import apply_rope, decode_attention
from sarathi.model_executor.ops.types import CacheTarget, DecodeBatch, RopeTable

OPS = create_ops(torch.device("cpu"))


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def test_rms_norm_is_a_projection_to_the_sphere() -> None:
    x, weight = torch.randn(7, 48, dtype=torch.float64), torch.rand(48, dtype=torch.float64)
    normed = OPS.rms_norm(x, weight, 0.0)
    expected = x / x.norm(dim=-1, keepdim=True) * 48**0.5 * weight
    torch.testing.assert_close(normed, expected, rtol=1e-6, atol=1e-6)  # the mean is float32 by contract


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs_also_of_heads_within_a_wider_tensor(dtype: torch.dtype) -> None:
    heads, weight = torch.randn(3, 7, 32, dtype=dtype)[:, 2:5], torch.rand(32, dtype=dtype)
    normed = OPS.rms_norm(heads, weight, 1e-6)
    assert normed.is_contiguous()
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(heads, (32,), weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_products_with_a_packed_weight_equal_plain_ones(dtype: torch.dtype, biased: bool) -> None:
    x, weight, residual = torch.randn(5, 24, dtype=dtype), torch.randn(16, 24, dtype=dtype), torch.randn(5, 16)
    bias = torch.randn(16, dtype=dtype) if biased else None
    product = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for stored in (weight, OPS.pack(weight)):
        torch.testing.assert_close(OPS.linear(x, stored, bias).double(), product, **close)
        out = torch.empty(7, 16, dtype=dtype)[1:6]
        assert OPS.linear(x, stored, bias, out=out) is out
        torch.testing.assert_close(out.double(), product, **close)
        gate, up = product.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(OPS.gated_linear(x, stored, bias).double(), expected, rtol=5e-2, atol=5e-2)
        total = residual.to(dtype, copy=True)
        OPS.linear_add(x, stored, total, bias)
        torch.testing.assert_close(total.double(), residual.to(dtype).double() + product, rtol=5e-2, atol=5e-2)


def test_rope_rotates_pairs_as_complex_numbers() -> None:
    angles = torch.rand(20, 12) * 6.28
    q, k = torch.randn(5, 3, 32), torch.randn(5, 2, 32)
    positions = torch.randint(0, 20, (5,))
    expected = [rotated(x, angles[positions]) for x in (q, k)]
    apply_rope(q, k, positions, RopeTable(angles.cos(), angles.sin()))
    torch.testing.assert_close([q, k], expected)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    half = angles.shape[1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    product = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((product.real, product.imag, x[..., 2 * half :]), dim=-1)


def test_padding_is_stored_nowhere() -> None:
    still = RopeTable(torch.ones(1, 4), torch.zeros(1, 4))
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    keys, values = torch.full((3, 6, 2, 8), -1.0), torch.full((3, 6, 2, 8), -1.0)
    target = CacheTarget(keys, values, torch.tensor([2, -1, 0, 2]), torch.tensor([5, 0, 1, 4]))
    OPS.rope_and_store(k.clone(), k, v, torch.zeros(4, dtype=torch.int32), still, target)
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
def test_argmax_is_torchs_where_logits_are_finite(dtype: torch.dtype) -> None:
    """The lowest of equals, whatever the strides; -1 for a NaN, for infinity and where all is excluded."""
    logits = torch.randn(8, 2000).to(dtype)[:, ::2]
    logits[0, 7], logits[0, 700], logits[1, 9], logits[2] = 90.0, 90.0, float("nan"), float("-inf")
    logits[3, 8], logits[4, ::3] = float("inf"), float("-inf")
    expected = logits.argmax(-1)
    expected[[1, 2, 3]] = -1
    for rows in (logits, logits[:0]):
        found = OPS.argmax(rows)
        assert found.dtype == torch.int64 and torch.equal(found, expected[: len(rows)])
    last_tokens, slots = torch.full((9,), 5), torch.arange(8).int()
    assert torch.equal(OPS.argmax_into(logits, slots, last_tokens), expected)
    assert torch.equal(last_tokens[:8], expected.clamp(min=0)) and last_tokens[8] == 5


GROWTH = """
import sys, torch
from pathlib import Path
from sarathi.model_executor.ops.native import NativeOps

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

ops, weight = NativeOps(), torch.randn(96, 64)
packed = ops.pack(weight)
with torch.inference_mode():
    for num_tokens in range(1, 1801):
        ops.linear(torch.randn(num_tokens, 64), packed)
        if num_tokens == 600:
            began = resident_mib()
print(resident_mib() - began)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_products_of_ever_new_sizes_keep_no_more_memory() -> None:
    """With the defaults of oneDNN and torch, 1,024 kernels are kept, in 540 MiB more; the allocator may keep 75."""
    ran = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 150
