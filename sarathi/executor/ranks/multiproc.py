"""Executor with several ranks, each in a process of its own on this machine.

A step is one message, the same to every rank, in shared memory; replies come over a pipe a rank. Ranks agree in shared
memory that all are prepared, and exchange tensors among themselves. A rank that dies, or that shows no sign of life for
some seconds, ends the step with an error that names it, and every rank with it.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Pipe, wait
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # stubs lack it

from sarathi.config.schema import EngineConfig
from sarathi.executor.ranks.board import Board
from sarathi.executor.ranks.broadcast import Broadcast, create_ring
from sarathi.executor.ranks.executor import RanksExecutor
from sarathi.executor.ranks.protocol import RankEnd, RankSetup, Reply, Transport, kill_and_close
from sarathi.model_executor.parallel.ranks import RankGrid
from sarathi.model_executor.sampling.grammar import MakeVocabulary, no_vocabulary
from sarathi.worker.device import DeviceUnavailableError, choose_device

_HOST = "127.0.0.1"
_SEND_S = 30.0
# NVLink multicast is off: where the driver refuses it, NCCL fails at its first collective.
_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0"}
_PROGRAM = "import sys; sys.path[:] = {path!r}; from sarathi.executor.ranks.process import main; main(*{descriptors})"


class _RankProcess:
    """One rank's process, the pipe to it, and what wakes it for a message."""

    def __init__(self, board: int, ring: int, environment: Mapping[str, str]) -> None:
        """board, ring: descriptors of shared memory."""
        self.waker = os.eventfd(0)
        self.pipe, theirs = Pipe()
        self.process = _start_interpreter((theirs.fileno(), board, ring, self.waker), environment)
        theirs.close()

    def close(self) -> None:
        self.pipe.close()
        if self.waker >= 0:
            os.close(self.waker)
        self.waker = -1


def _start_interpreter(inherited: Sequence[int], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Run a rank in a fresh interpreter. inherited: the descriptors that it is given, in the order of its `main`."""
    program = _PROGRAM.format(path=sys.path, descriptors=tuple(inherited))
    # A session of its own: Ctrl-C goes to this process alone, which ends the ranks.
    return subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=inherited, env=environment, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


class _ProcessTransport(Transport):
    """Shared memory for messages to processes and for their signs of life, and pipes for their replies."""

    end_delay_s = 3.0  # a GPU process that ends closes its sockets before its memory is freed

    def __init__(self, setups: Sequence[RankSetup]) -> None:
        self.size = len(setups)
        board, ring = Board.create(self.size), create_ring(self.size)
        self._board = Board(board, self.size)
        self.processes: list[_RankProcess] = []
        try:
            for setup in setups:
                self._board.beat(setup.rank)
                self.processes.append(_RankProcess(board, ring, {**_ENVIRONMENT, **os.environ}))
                self.processes[-1].pipe.send_bytes(pickle.dumps(setup))
            self._messages = Broadcast(ring, [each.waker for each in self.processes], _SEND_S)
        except BaseException:
            kill_and_close(self)
            raise
        finally:
            os.close(board)
            os.close(ring)

    def send(self, message: bytes) -> None:
        self._messages.send(message)

    def receive(self, timeout_s: float) -> list[tuple[int, Reply | None]]:
        ranks: dict[Any, int] = {each.pipe: rank for rank, each in enumerate(self.processes)}
        return [(ranks[pipe], _receive(pipe)) for pipe in wait(list(ranks), timeout_s)]

    def silence_s(self, rank: int) -> float:
        return self._board.silence_s(rank)

    def end(self, rank: int) -> RankEnd | None:
        code = self.processes[rank].process.poll()
        if code is None:
            return None
        if code < 0:
            return RankEnd(f"was ended by {signal.Signals(-code).name}", is_cause=True)
        return RankEnd(f"ended with exit code {code}", is_cause=False)

    def place(self, rank: int) -> str:
        return f"process {self.processes[rank].process.pid}"

    def kill(self) -> None:
        for each in self.processes:
            each.process.kill()
        for each in self.processes:
            each.process.wait()

    def close(self) -> None:
        for each in self.processes:
            each.close()


def _receive(pipe: Any) -> Reply | None:
    """None where the other end is gone."""
    try:
        reply: Reply = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return None
    return reply


class MultiprocExecutor(RanksExecutor):
    """The ranks of both parallel sizes on this machine. Raises ValueErrors that name the setting which cannot work."""

    def __init__(
        self, config: EngineConfig, make_vocabulary: MakeVocabulary = no_vocabulary, first_device: int = 0
    ) -> None:
        """first_device: the CUDA device of rank 0; the others follow."""
        grid = RankGrid(config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size)
        device = _device_of_ranks(config, grid.size, first_device)
        self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        num_threads = max(1, torch.get_num_threads() // grid.size)
        devices = [f"cuda:{first_device + rank}" if device == "cuda" else device for rank in range(grid.size)]
        store = (_HOST, self._store.port)
        setups = [
            RankSetup(config, rank, grid, name, num_threads, store, make_vocabulary)
            for rank, name in enumerate(devices)
        ]
        super().__init__(_ProcessTransport(setups), config.parallel, store)


def _device_of_ranks(config: EngineConfig, size: int, first: int) -> str:
    """The kind of device; rank i takes the i-th of them, counted from `first`."""
    device = choose_device(config.model.device)
    if device.type == "cuda":
        if device.index is not None and first + size > 1:
            raise DeviceUnavailableError(
                f"device={config.model.device!r} is one device, and {size} ranks take {size} from cuda:{first} on: use "
                "device='cuda'"
            )
        if first + size > torch.cuda.device_count():
            raise DeviceUnavailableError(
                f"tensor_parallel_size x pipeline_parallel_size is {size}, and {first} devices are taken: this machine "
                f"has {torch.cuda.device_count()} CUDA devices"
            )
    return device.type
