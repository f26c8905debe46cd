"""What the ranks of a model exchange: sums, gathered tensors, the least of a number."""

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

# Renamed in torch 2.13; the first name is deprecated there.
_all_gather = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
_TIMEOUT = timedelta(days=1)  # the executor watches the ranks; one that waits for work does not fail


class Ranks(Protocol):
    """This rank and the others. Every rank calls the same methods in the same order."""

    rank: int
    size: int

    def add_up(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks, the same bits on every rank."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's contiguous tensor, all of one shape -> [size, *shape]."""

    def least(self, value: int) -> int:
        """The least of the ranks' values."""


class OneRank(Ranks):
    """A model that is not split."""

    rank, size = 0, 1

    def add_up(self, tensor: Tensor) -> None:
        """The sum is the tensor."""

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def least(self, value: int) -> int:
        return value


class ProcessRanks(Ranks):
    """Ranks in processes of their own: gloo on CPUs, NCCL on GPUs. Safe in CUDA graphs."""

    def __init__(self, rank: int, size: int, store: Any, device: torch.device) -> None:
        """store: a torch.distributed.Store, where the ranks find each other."""
        self.rank, self.size, self._device = rank, size, device
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT, device_id=device_id
        )

    def add_up(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(gathered, tensor)
        return gathered.view(self.size, *tensor.shape)

    def least(self, value: int) -> int:
        tensor = torch.tensor(value, device=self._device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
        return int(tensor)
