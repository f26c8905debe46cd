"""Attention written as its definition says, in float64 and one query at a time: the reference of the fast functions."""

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, window: tuple[int, int]) -> Tensor:
    """q [Sq, Hq, D] at the end of k, v [Sk, Hkv, D] -> [Sq, Hq, D] float64; a query that sees nothing gives zeros."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    left, right = window
    for row in range(q.shape[0]):
        position = k.shape[0] - q.shape[0] + row
        first = 0 if left < 0 else max(0, position - left)
        last = k.shape[0] - 1 if right < 0 else min(k.shape[0] - 1, position + right)
        last = min(last, position) if causal else last
        if last < first:
            continue
        for head in range(q.shape[1]):
            shared = head // (q.shape[1] // k.shape[1])
            scores = [scale * float(q[row, head] @ k[col, shared]) for col in range(first, last + 1)]
            peak = max(scores)
            weights = [math.exp(score - peak) for score in scores]
            for col, weight in zip(range(first, last + 1), weights, strict=True):
                out[row, head] += weight / sum(weights) * v[col, shared]
    return out
