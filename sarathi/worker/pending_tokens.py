"""Stand-ins for tokens that are sampled but not known to the host yet; knows no requests and not who samples."""

import torch
from torch import Tensor


def placeholder_token(home: int) -> int:
    """In place of a token id, below 0: the token is `home`'s newest, and on the device only."""
    return -1 - home


def resolve(token_ids: Tensor, newest: Tensor) -> Tensor:
    """token_ids of any shape; newest: [homes] int64 -> token_ids with the tokens that stand-ins stand for."""
    homes = (-1 - token_ids).clamp_(min=0)
    return torch.where(token_ids < 0, newest[homes].to(token_ids.dtype), token_ids)
