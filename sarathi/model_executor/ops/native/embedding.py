"""Torch twin of the embedding kernel. Knows nothing of layers."""

from torch import Tensor
from torch.nn import functional

from sarathi.model_executor.ops.types import resolve


def embed(token_ids: Tensor, newest: Tensor, weight: Tensor) -> Tensor:
    """``weight[token_ids]``, where a stand-in, below 0, means the token that it stands for.

    token_ids: [num_tokens] int32 or int64; newest: [homes] int64; weight: [vocab_size, size].
    Returns [num_tokens, size].
    """
    return functional.embedding(resolve(token_ids, newest), weight)
