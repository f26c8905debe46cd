"""Executor with several ranks, each in a process of its own on this machine.

A step is one message, the same to every rank, over a pipe a rank. Ranks agree in shared memory that all are prepared,
and exchange tensors among themselves. A rank that dies, or that shows no sign of life for some seconds, ends the step
with an error that names it, and every rank with it.
"""

import math
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from multiprocessing.connection import Pipe
from multiprocessing.connection import wait as wait_for_any
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # stubs lack it

from sarathi.config.schema import EngineConfig
from sarathi.executor.base import Executor
from sarathi.executor.board import Board
from sarathi.executor.rank_process import Command, RankFacts, RankSetup, Reply, is_answered
from sarathi.executor.uniproc import UnsupportedParallelismError
from sarathi.messages import MemoryStats, SchedulerOutput, StepResult
from sarathi.worker.device import DeviceUnavailableError, choose_device

_SILENCE_S = 8.0  # after which a rank counts as hung; its process shows life ten times a second
_START_SILENCE_S = 60.0  # the same while libraries are loaded, which may stop all threads of a process
_LOOK_S = 0.25  # between looks at the ranks while a reply is waited for
_GRACE_S = 1.0  # after a first failure, for the one that caused it to show: the others lose their connections
_SEND_S = 30
_CLOSE_S = 20.0
# NVLink multicast is off: where the driver refuses it, NCCL fails at its first collective.
_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0"}
_PROGRAM = "import sys; sys.path[:] = {path!r}; from sarathi.executor.rank_process import main; main({pipe}, {board})"


class RankError(RuntimeError):
    """A rank died, hung or failed; the message names it."""


class LaunchedStep:
    """The StepFuture of a step on all ranks."""

    def __init__(self, executor: "MultiprocExecutor", number: int) -> None:
        self._executor, self._number = executor, number
        self._outcome: StepResult | None = None

    def result(self) -> StepResult:
        if self._outcome is None:
            self._outcome = self._executor.ask("result", self._number)[0]
        return self._outcome


class _RankProcess:
    """One rank's process and the pipe to it."""

    def __init__(self, rank: int, board: int, environment: Mapping[str, str]) -> None:
        self.rank = rank
        self.pipe, theirs = Pipe()
        with socket.socket(fileno=os.dup(self.pipe.fileno())) as pipe:  # a rank that hangs reads no long message
            pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
        program = _PROGRAM.format(path=sys.path, pipe=theirs.fileno(), board=board)
        # A session of its own: Ctrl-C goes to this process alone, which ends the ranks.
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], pass_fds=(theirs.fileno(), board), env=environment,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    def death(self) -> str | None:
        """How the process ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class _Ranks:
    """All ranks: one message to each, and their replies. After a failure no rank is left."""

    def __init__(self, setups: Sequence[RankSetup]) -> None:
        descriptor = Board.create(len(setups))
        self._board = Board(descriptor, len(setups))
        self._number = 0
        self._processes: list[_RankProcess] = []
        self._stop = weakref.finalize(self, _kill, self._processes)
        try:
            for setup in setups:
                self._board.beat(setup.rank)
                process = _RankProcess(setup.rank, descriptor, {**_ENVIRONMENT, **os.environ})
                self._processes.append(process)
                process.pipe.send_bytes(pickle.dumps(setup))
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(descriptor)

    @property
    def are_running(self) -> bool:
        return self._stop.alive

    def ask(self, method: str, *arguments: Any, silence_s: float = _SILENCE_S, limit_s: float = math.inf) -> list[Any]:
        """Send a command to every rank; returns the replies of those that answer it, in order of rank.

        Raises RankError, or the ValueError of a rank. silence_s: without a sign of life until a rank counts as hung.
        limit_s: until all must have answered.
        """
        if not self.are_running:
            raise RankError(f"the ranks have ended: {method} cannot be run")
        self._number += 1
        message = pickle.dumps(Command(self._number, method, arguments))
        try:
            self._check_life(silence_s)
            self._send(message)
            answering = [each for each in self._processes if is_answered(method, each.rank)]
            return self._replies(answering, silence_s, time.monotonic() + limit_s)
        except (RankError, ValueError):
            self.kill()
            raise

    def kill(self) -> None:
        """End every process, also one that is stopped. Idempotent."""
        self._stop()

    def _send(self, message: bytes) -> None:
        try:
            for each in self._processes:
                each.pipe.send_bytes(message)
        except OSError:
            self._fail()
        except BaseException:  # some ranks have the message and others have not
            self.kill()
            raise

    def _replies(self, answering: Sequence[_RankProcess], silence_s: float, deadline_s: float) -> list[Any]:
        replies: dict[int, Any] = {}
        while len(replies) < len(answering):
            by_pipe: dict[Any, _RankProcess] = {each.pipe: each for each in self._processes}
            for pipe in wait_for_any(list(by_pipe), _LOOK_S):
                reply = _receive(pipe)
                if reply is None or reply.error is not None:
                    self._fail(by_pipe[pipe], reply)
                if reply.number == self._number:  # not one that was no longer waited for
                    replies[by_pipe[pipe].rank] = reply.value
            self._check_life(silence_s)
            if time.monotonic() > deadline_s and len(replies) < len(answering):
                raise RankError(
                    f"ranks that did not answer: {sorted({each.rank for each in answering} - set(replies))}"
                )
        return [replies[each.rank] for each in answering]

    def _check_life(self, silence_s: float) -> None:
        for each in self._processes:
            silent_s = self._board.silence_s(each.rank)
            if silent_s > silence_s:
                raise RankError(
                    f"rank {each.rank} of {len(self._processes)} (process {each.process.pid}) hangs: no sign of life "
                    f"for {silent_s:.1f} s"
                )

    def _fail(self, first: _RankProcess | None = None, reply: Reply | None = None) -> NoReturn:
        """Raise what ended the ranks: a user's error, else a death by signal, else what the first one said."""
        if reply is not None and isinstance(reply.error, ValueError):
            raise reply.error
        deadline = time.monotonic() + _GRACE_S
        while not (killed := self._ended(lambda code: code < 0)) and time.monotonic() < deadline:
            time.sleep(0.02)
        size = len(self._processes)
        if not killed and first is not None and reply is not None:
            raise RankError(f"rank {first.rank} of {size} failed: {reply.error}")
        for each in killed or self._ended(lambda code: True):
            raise RankError(f"rank {each.rank} of {size} (process {each.process.pid}) {each.death()}")
        raise RankError(f"a rank of {size} closed its connection")

    def _ended(self, by: Callable[[int], bool]) -> list[_RankProcess]:
        """Processes that have ended with such an exit code, which is negative for a signal."""
        codes = [(each, each.process.poll()) for each in self._processes]
        return [each for each, code in codes if code is not None and by(code)]


def _receive(pipe: Any) -> Reply | None:
    """None where the other end is gone."""
    try:
        reply: Reply = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return None
    return reply


def _kill(processes: list[_RankProcess]) -> None:
    for each in processes:
        each.process.kill()
    for each in processes:
        each.kill()


class MultiprocExecutor(Executor):
    """tensor_parallel_size ranks on this machine. Raises ValueErrors that name the setting which cannot work."""

    def __init__(self, config: EngineConfig) -> None:
        parallel = config.parallel
        if parallel.pipeline_parallel_size != 1:
            raise UnsupportedParallelismError(
                f"pipeline_parallel_size={parallel.pipeline_parallel_size}: pipeline parallelism is not implemented; "
                "it must be 1, and tensor_parallel_size spreads the model"
            )
        size, device = parallel.tensor_parallel_size, _device_of_ranks(config)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        num_threads = max(1, torch.get_num_threads() // size)
        self._ranks = _Ranks(
            [RankSetup(config, rank, size, device, num_threads, self._store.port) for rank in range(size)]
        )
        facts: list[RankFacts] = self._ranks.ask("facts", silence_s=_START_SILENCE_S)
        self.capacity = min((each.capacity for each in facts), key=lambda capacity: capacity.rows)
        self.vocab_size, self.max_model_len, self.dtype_eps = (
            facts[0].vocab_size,
            facts[0].max_model_len,
            facts[0].dtype_eps,
        )
        self.token_bytes = sum(each.token_bytes for each in facts)
        self.dtype_eps, self.max_in_flight = facts[0].dtype_eps, facts[0].max_in_flight
        self._num_launched = 0

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """The replies of the ranks that answer a command. Raises RankError where one died, hung or failed."""
        return self._ranks.ask(method, *arguments)

    def launch(self, out: SchedulerOutput) -> LaunchedStep:
        if any(new.sampling_params.logits_processors for new in out.new_requests):
            raise ValueError(
                "logits_processors must be empty where executor is multiproc: they are functions of one process"
            )
        number, self._num_launched = self._num_launched, self._num_launched + 1
        self.ask("launch", number, out)
        return LaunchedStep(self, number)

    def execute(self, out: SchedulerOutput) -> StepResult:
        """Launch one step and wait for its result."""
        return self.launch(out).result()

    def wait(self) -> None:
        if self._ranks.are_running:
            self.ask("wait")

    def memory_stats(self) -> MemoryStats:
        if not self._ranks.are_running:
            return MemoryStats()
        stats: list[MemoryStats] = self.ask("memory_stats")
        names = [each.name for each in fields(MemoryStats)]
        return MemoryStats(**{name: sum(getattr(each, name) for each in stats) for name in names})

    def check_integrity(self) -> None:
        if self._ranks.are_running:
            self.ask("check_integrity")

    def shutdown(self) -> None:
        """Kills ranks that do not close within some seconds."""
        try:
            if self._ranks.are_running:
                self._ranks.ask("close", limit_s=_CLOSE_S)
        except RankError:
            pass  # it is gone, as it should be
        finally:
            self._ranks.kill()


def _device_of_ranks(config: EngineConfig) -> str:
    """The kind of device; rank i takes the i-th of them."""
    size, device = config.parallel.tensor_parallel_size, choose_device(config.model.device)
    if device.type == "cuda":
        if device.index is not None and size > 1:
            raise DeviceUnavailableError(
                f"device={config.model.device!r} is one device, tensor_parallel_size={size} takes the first {size}: "
                "use device='cuda'"
            )
        if size > torch.cuda.device_count():
            raise DeviceUnavailableError(
                f"tensor_parallel_size={size}: this machine has {torch.cuda.device_count()} CUDA devices"
            )
    return device.type
