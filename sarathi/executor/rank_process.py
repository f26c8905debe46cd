"""The process of one rank: receives messages, the same as every other rank, and runs its share of each step."""

import gc
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # stubs lack it

from sarathi.config.schema import EngineConfig
from sarathi.executor.board import Board
from sarathi.executor.steps import Steps
from sarathi.messages import CacheCapacity, SchedulerOutput, StepFuture, StepResult
from sarathi.model_executor.parallel.ranks import OneRank, ProcessRanks, Ranks
from sarathi.worker.worker import Worker

_BEAT_S = 0.1
_KEPT_STEPS = 8  # whose results may be asked for again


class RankSetup(NamedTuple):
    """What a rank is built from. device: "cpu" or "cuda". store_port: of the TCPStore on this machine."""

    config: EngineConfig
    rank: int
    size: int
    device: str
    num_threads: int
    store_port: int


class RankFacts(NamedTuple):
    """What a rank tells when its model is loaded; see Executor."""

    capacity: CacheCapacity
    vocab_size: int
    max_model_len: int
    token_bytes: int
    dtype_eps: float
    max_in_flight: int


class Command(NamedTuple):
    """What the executor sends every rank: a method of `RankService` by name, with its arguments."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


class Reply(NamedTuple):
    """number: of the command that it answers, or that failed."""

    number: int
    value: Any = None
    error: Exception | None = None


class RankService:
    """The commands of a rank."""

    def __init__(self, setup: RankSetup, board: Board) -> None:
        config, ranks = _connect(setup)
        self._rank, self._worker = setup.rank, Worker(config, ranks)
        self._steps = Steps(self._worker, lambda rows: board.agree(setup.rank, rows))
        self._futures: dict[int, StepFuture] = {}
        gc.collect()
        gc.freeze()

    def facts(self) -> RankFacts:
        worker = self._worker
        return RankFacts(
            worker.capacity, worker.vocab_size, worker.max_model_len, worker.token_bytes, worker.dtype_eps,
            worker.max_in_flight,
        )  # fmt: skip

    def launch(self, number: int, out: SchedulerOutput) -> None:
        """number: counts launches from 0."""
        self._futures[number] = self._steps.launch(out)
        self._futures.pop(number - _KEPT_STEPS, None)

    def result(self, number: int) -> StepResult | None:
        """Every rank takes the result at the same place among the messages; rank 0 tells it."""
        result = self._futures[number].result()
        return result if self._rank == 0 else None

    def wait(self) -> None:
        self._worker.wait()

    def memory_stats(self) -> Any:
        return self._worker.memory_stats()

    def check_integrity(self) -> None:
        self._worker.check_integrity()

    def close(self) -> None:
        """The process ends next, and the process group with it: to destroy NCCL's waits for graphs that hold it."""
        self._worker.close()


_ANSWERED = frozenset(("facts", "wait", "memory_stats", "check_integrity", "close"))  # by every rank


def is_answered(method: str, rank: int) -> bool:
    """Whether a rank replies to a command that succeeds. Launches are not waited for; rank 0 alone has results."""
    return method in _ANSWERED or (method == "result" and rank == 0)


def main(connection: int, board: int) -> None:
    """Serve until the executor closes the connection. Arguments: inherited file descriptors."""
    channel = Connection(connection)
    setup: RankSetup = pickle.loads(channel.recv_bytes())
    shared = Board(board, setup.size)
    shared.beat(setup.rank)
    threading.Thread(target=_show_life, args=(shared, setup.rank, os.getppid()), daemon=True).start()
    try:
        _serve(channel, setup, shared)
    except (EOFError, ConnectionError):  # the executor is gone
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads of the process group may wait for ranks that are gone


def _serve(channel: Connection, setup: RankSetup, board: Board) -> None:
    service: RankService | None = None
    number, method = 0, "facts"
    try:
        service = RankService(setup, board)
        while method != "close":
            number, method, arguments = pickle.loads(channel.recv_bytes())
            value = getattr(service, method)(*arguments)
            if is_answered(method, setup.rank):
                channel.send_bytes(pickle.dumps(Reply(number, value)))
    except (EOFError, ConnectionError):
        raise
    except Exception as error:
        channel.send_bytes(_failure(number, error))


def _failure(number: int, error: Exception) -> bytes:
    """The error itself where the user can act on it (ValueError), else its text."""
    if not isinstance(error, ValueError):
        traceback.print_exc()
        error = RuntimeError(f"{type(error).__name__}: {error}")
    try:
        message = pickle.dumps(Reply(number, error=error))
        pickle.loads(message)
    except Exception:
        message = pickle.dumps(Reply(number, error=ValueError(str(error))))
    return message


def _connect(setup: RankSetup) -> tuple[EngineConfig, Ranks]:
    """Join the process group; the configuration with this rank's device."""
    torch.set_num_threads(setup.num_threads)
    config = setup.config
    device = torch.device("cpu")
    if setup.device == "cuda":
        device = torch.device("cuda", setup.rank)
        torch.cuda.set_device(device)
    config = replace(config, model=replace(config.model, device=str(device)))
    if setup.size == 1:
        return config, OneRank()
    store = TCPStore("127.0.0.1", setup.store_port, is_master=False)
    return config, ProcessRanks(setup.rank, setup.size, store, device)


def _show_life(board: Board, rank: int, parent: int, leave: Callable[[int], None] = os._exit) -> None:
    """Beat until the parent is gone, then end the process, whatever it waits for."""
    while os.getppid() == parent:
        board.beat(rank)
        time.sleep(_BEAT_S)
    leave(1)
