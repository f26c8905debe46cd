"""The operations of a decoder in torch: the reference that kernels are tested against, and the CPU's path."""

import os

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from sarathi.model_executor.ops.types import CacheTarget, DecodeBatch, NewTokens, RopeTable, resolve

# oneDNN compiles a packed product for every number of tokens: 0.3 MB each. It and torch keep 1,024 by default, and
# read these variables at the first product.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "256")

_TOP_TOKENS = 1024  # the likeliest tokens, sorted first; all are sorted only if these do not reach top_p
_PACKED_TOKENS = 64  # the batch size that packed layouts are chosen for; those chosen for 16 or more suit all sizes


class NativeOps:
    """Implements ``sarathi.model_executor.ops.Ops`` on any device; signatures and shapes of the operations."""

    def embed(self, token_ids: Tensor, weight: Tensor, last_tokens: Tensor | None = None) -> Tensor:
        """``weight[token_ids]``; a placeholder token -1 - s stands for ``last_tokens[s]``.

        token_ids: [num_tokens] int32 or int64; weight: [vocab_size, size]; last_tokens: [slots] int64, None where
        there are no placeholder tokens. Returns [num_tokens, size].
        """
        if last_tokens is not None:
            token_ids = resolve(token_ids, last_tokens)
        return functional.embedding(token_ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square normalization over the last dimension (Zhang and Sennrich, 2019).

        x: [..., size]; weight: [size]. The mean is taken in float32 and the quotient rounded to x's dtype before
        the weight is applied, as the reference implementations of Llama do. Returns a contiguous tensor like x.
        """
        if x.dtype == torch.float32:  # one temporary of x's size instead of four: a tenth of the time on a CPU
            scale = torch.linalg.vecdot(x, x).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
            scaled: Tensor = (x * scale.unsqueeze(-1)).mul_(weight)
            return scaled
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return normed.to(x.dtype) * weight

    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: RopeTable, target: CacheTarget
    ) -> None:
        """``apply_rope``, then ``store`` the rotated keys and the values v: [num_tokens, kv_heads, head_size].

        Padding (a negative row of the target) is rotated but stored nowhere.
        """
        apply_rope(q, k, positions, table)
        kept = target.rows >= 0
        rows, cols = target.rows[kept].long(), target.cols[kept].long()
        target.keys[rows, cols] = k[kept]
        target.values[rows, cols] = v[kept]

    def pack(self, weight: Tensor) -> Tensor:
        """The weight [out, in] in the fastest layout for ``linear``; no other operation may use it.

        On CPUs oneDNN's blocked layout: 1.2 to 4 times as fast.
        """
        if not _is_packable(weight):
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_TOKENS)
        return packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``. x: [num_tokens, in]; weight: [out, in], packed or not; bias: [out].

        Returns [num_tokens, out]; `out`, contiguous, if given.
        """
        if weight.is_mkldnn:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return product if out is None else out.copy_(product)
        product = functional.linear(x, weight, bias, out=out)  # type: ignore[call-arg]  # stubs lack it
        return product

    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> None:
        """``residual += linear(x, weight, bias)`` in place. residual: [num_tokens, out], contiguous."""
        residual.add_(self.linear(x, weight, bias))

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``silu_and_mul(linear(x, weight, bias))``. weight: [2 * out, in], gate first. Returns [num_tokens, out]."""
        return self.silu_and_mul(self.linear(x, weight, bias))

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up``. gate_up: [num_tokens, 2 * size], gate first. Returns [num_tokens, size]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def argmax(self, logits: Tensor) -> Tensor:
        """The lowest index of the largest logit; -1 where a logit is NaN, or the largest one is infinite.

        logits: [num_samples, vocab_size]. Returns [num_samples] int64.
        """
        if logits.device.type == "cpu" and logits.dtype == torch.float32:
            tokens = torch.from_numpy(logits.numpy().argmax(axis=-1))  # 6 times as fast as torch's for 64 x 49,152
        else:
            tokens = logits.argmax(dim=-1)
        largest = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)  # both find NaN largest
        return torch.where(largest.isfinite(), tokens, -1)

    def argmax_into(self, logits: Tensor, slots: Tensor, last_tokens: Tensor) -> Tensor:
        """``argmax``, stored in ``last_tokens[slots]`` (-1 as 0). slots: [num_samples] int32; last_tokens: int64."""
        tokens = self.argmax(logits)
        last_tokens[slots.long()] = tokens.clamp(min=0)
        return tokens

    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """-inf, in place, for the tokens of some rows whose bit is not set.

        logits: [num_samples, vocab_size] float32; rows: [A] int64; bits: [A, ceil(vocab_size / 32)] int32, bit i of
        word w for token 32 * w + i.
        """
        packed = bits.cpu().numpy().view(numpy.uint8)
        is_allowed = numpy.unpackbits(packed, axis=1, count=logits.shape[1], bitorder="little")
        kept = torch.from_numpy(is_allowed).view(torch.bool).to(logits.device)
        logits[rows] = torch.where(kept, logits[rows], float("-inf"))

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One token per sample by inverting ``softmax(logits)``: the first whose cumulative probability > `uniform`.

        logits: [num_samples, vocab_size] float32, excluded tokens at -inf; uniform: [num_samples, 1] float64 in [0, 1).
        Returns [num_samples] int64.
        """
        cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
        target = uniform * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        return drawn.clamp_(max=logits.shape[-1] - 1)

    def top_p_threshold(self, logits: Tensor, top_p: Tensor) -> Tensor:
        """The smallest logit of the fewest likeliest tokens that together reach top_p (Holtzman et al., 2020).

        logits: [num_samples, vocab_size] float32; top_p: [num_samples, 1] float32; 0 keeps the likeliest token alone.
        Returns [num_samples, 1], -inf for a top_p of 1.
        """
        total = logits.logsumexp(dim=-1, keepdim=True)
        for size in (min(_TOP_TOKENS, logits.shape[-1]), logits.shape[-1]):
            largest = logits.topk(size, dim=-1).values
            probabilities = (largest - total).exp()
            reached = probabilities.cumsum(dim=-1)
            if bool((reached[:, -1:] >= top_p)[top_p < 1.0].all()):
                break
        inside = reached - probabilities < top_p  # the more likely tokens alone do not reach it
        inside[:, 0] = True
        floor = largest.masked_fill(~inside, float("inf")).amin(dim=-1, keepdim=True)
        return torch.where(top_p < 1.0, floor, float("-inf"))


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, table: RopeTable) -> None:
    """Rotary embedding of q and k in place (Su et al., 2021): element i is paired with element i + rotary_dim / 2.

    q: [num_tokens, heads, head_size]; k: [num_tokens, kv_heads, head_size], any strides with the last one 1;
    positions: [num_tokens] integers. Elements past rotary_dim stay as they are. Arithmetic is float32.
    """
    cos, sin = table.cos[positions].float()[:, None], table.sin[positions].float()[:, None]
    half = cos.shape[-1]
    for x in (q, k):
        left, right = x[..., :half].float(), x[..., half : 2 * half].float()
        x[..., : 2 * half] = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, scale: float, new: NewTokens | None = None
) -> Tensor:
    """Attention of one query token per sequence over its slot of a contiguous cache, in float32.

    q: [num_seqs, heads, head_size]; keys, values: [num_slots, slot_tokens, kv_heads, head_size].
    Returns q's shape and dtype; zeros for a length of 0 (padding). Nothing past a length is read.
    new: the step's keys and values; they are rotated and stored first, and q is rotated with them. None where q is
    rotated and the cache holds them already.
    """
    if new is not None:
        q = _append(q, keys, values, batch, new)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for index, (slot, length) in enumerate(zip(batch.slots.tolist(), batch.lengths.tolist(), strict=True)):
        first = 0 if batch.window is None else max(0, length - batch.window)
        if length:
            out[index] = _attend(q[index], keys[slot, first:length], values[slot, first:length], scale).to(q.dtype)
    return out


def _append(q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, new: NewTokens) -> Tensor:
    """Store the new tokens, padding excepted. Returns the rotated queries."""
    q, positions = q.clone(), (batch.lengths - 1).clamp(min=0)
    target = CacheTarget(keys, values, torch.where(batch.lengths > 0, batch.slots, -1), positions)
    NativeOps().rope_and_store(q, new.keys.clone(), new.values, positions, new.table, target)
    return q


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    groups = q.float().view(keys.shape[1], -1, q.shape[-1])  # [kv_heads, heads / kv_heads, head_size]
    scores = torch.einsum("hgd,thd->hgt", groups, keys.float()) * scale
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), values.float()).reshape(q.shape)


def _is_packable(weight: Tensor) -> bool:
    """Whether torch has oneDNN and, for bfloat16, it has kernels for this processor (AVX-512 or newer)."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
