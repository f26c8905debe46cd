"""Token embedding; knows the vocabulary's size, not its words."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sarathi.model_executor.placement import Placement


class Embedding:
    """One row of `weight`, [vocab_size, hidden_size], for each token."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=place.dtype, device=place.device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] integers -> [T, hidden_size]."""
        return F.embedding(token_ids, self.weight)
