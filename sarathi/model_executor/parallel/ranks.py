"""Communication between the ranks of a model: sums, gathered tensors, the residual stream, minima."""

import time
from collections import deque
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor

# Renamed in torch 2.13; the first name is deprecated there.
_all_gather = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
_TIMEOUT = timedelta(days=1)  # the executor detects dead ranks; waiting for work is not an error


class RankGrid(NamedTuple):
    """The ranks of an engine: stages of a pipeline, each with the ranks that share its layers."""

    per_stage: int
    num_stages: int

    @property
    def size(self) -> int:
        return self.per_stage * self.num_stages

    @property
    def result_rank(self) -> int:
        """The first rank of the last stage, which returns the results of steps."""
        return self.per_stage * (self.num_stages - 1)


class Ranks(Protocol):
    """This rank and the others. The ranks of a stage call the same methods in the same order.

    number: index among all ranks. rank, size: index in its stage, and ranks of a stage. stage, num_stages: of the
    pipeline. waited_s: seconds that `receive` has waited so far, on a CPU.
    """

    number: int
    rank: int
    size: int
    stage: int
    num_stages: int
    waited_s: float

    def add_up(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the ranks of the stage, the same bits on every rank."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The contiguous tensor of every rank of the stage, all of one shape -> [size, *shape]."""

    def send(self, tensor: Tensor) -> None:
        """Send a contiguous tensor to the same rank of the next stage; it must not change afterwards."""

    def receive(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor from the same rank of the previous stage."""

    def least(self, value: int) -> int:
        """The least value of all ranks of all stages."""


class OneRank(Ranks):
    """A model that is not split."""

    number, rank, size, stage, num_stages, waited_s = 0, 0, 1, 0, 1, 0.0

    def add_up(self, tensor: Tensor) -> None:
        """The sum is the tensor."""

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def send(self, tensor: Tensor) -> None:
        raise RuntimeError("one rank has no stage behind it")

    def receive(self, tensor: Tensor) -> None:
        raise RuntimeError("one rank has no stage before it")

    def least(self, value: int) -> int:
        return value


class ProcessRanks(Ranks):
    """Ranks in processes of their own: gloo on CPUs, NCCL on GPUs. Safe in CUDA graphs."""

    def __init__(self, number: int, grid: RankGrid, store: Any, device: torch.device) -> None:
        """store: a torch.distributed.Store for the rendezvous."""
        self.number, self.size, self.num_stages = number, grid.per_stage, grid.num_stages
        self.stage, self.rank = divmod(number, grid.per_stage)
        self.waited_s = 0.0
        self._device, self._sent = device, deque[tuple[Any, Tensor]]()
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        torch.distributed.init_process_group(
            backend, store=store, rank=number, world_size=grid.size, timeout=_TIMEOUT, device_id=device_id
        )
        self._group = self._stage_group() if self.num_stages > 1 and self.size > 1 else None

    def add_up(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor, group=self._group)

    def gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        _all_gather(gathered, tensor, group=self._group)
        return gathered.view(self.size, *tensor.shape)

    def send(self, tensor: Tensor) -> None:
        """Asynchronous on a CPU: the next step may start before the tensor has arrived."""
        target = self.number + self.size
        if tensor.is_cuda:
            torch.distributed.send(tensor, target)
            return
        while len(self._sent) >= self.num_stages or (self._sent and self._sent[0][0].is_completed()):
            self._sent.popleft()[0].wait()
        self._sent.append((torch.distributed.isend(tensor, target), tensor))

    def receive(self, tensor: Tensor) -> None:
        began_s = time.perf_counter()
        torch.distributed.recv(tensor, self.number - self.size)
        self.waited_s += time.perf_counter() - began_s

    def least(self, value: int) -> int:
        tensor = torch.tensor(value, device=self._device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
        return int(tensor)

    def _stage_group(self) -> Any:
        """Every rank must create the groups of all stages, in the same order."""
        groups = [
            torch.distributed.new_group(list(range(stage * self.size, (stage + 1) * self.size)), timeout=_TIMEOUT)
            for stage in range(self.num_stages)
        ]
        return groups[self.stage]
