"""Replicas in processes of this machine."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.replicas.base import Replica, ReplicaError
from sarathi.benchmark.run.processes import ended_by_signals, stopped_by_signals
from sarathi.benchmark.run.runner import BenchmarkRunner
from sarathi.parent_death import end_with_parent

_END_S = 10.0


class ProcessReplica(Replica):
    """A replica in a child process, with a pipe to it."""

    def __init__(self, number: int, process: SpawnProcess, pipe: Connection) -> None:
        super().__init__(number)
        self._process, self._pipe = process, pipe

    def begin(self) -> None:
        with suppress(OSError):  # it is gone: `outcome` tells
            self._pipe.send(None)

    def interrupt(self) -> None:
        """A ^C of the terminal has reached the process already: a second signal changes nothing."""
        self._process.terminate()

    def is_ready(self, timeout_s: float) -> bool:
        return self._pipe.poll(timeout_s)

    def end(self) -> None:
        self._pipe.close()
        self._process.join(timeout=_END_S)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            raise ReplicaError(f"replica {self._number} ended without a result") from None


@contextmanager
def started_processes(config: BenchmarkConfig, devices: Mapping[str, str]) -> Iterator[Sequence[Replica]]:
    """Start the replicas of a run as processes. devices: see `replica_devices`."""
    with ExitStack() as stack:
        replicas = []
        for number in range(config.cluster.num_replicas):
            replicas.append(_start(config, number, devices.get(str(number))))
            stack.callback(replicas[-1].end)
        yield replicas


def _start(config: BenchmarkConfig, number: int, device: str | None) -> ProcessReplica:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (config, number, device, theirs, os.getpid())
    process = context.Process(target=_run_replica, args=arguments, name=f"replica {number}")
    process.start()
    theirs.close()
    return ProcessReplica(number, process, ours)


def _run_replica(config: BenchmarkConfig, replica: int, device: str | None, pipe: Connection, parent: int) -> None:
    """Main function of a replica's process; ^C and SIGTERM end its run with partial results.

    After the start, signals set an event: an exception could interrupt the making or sending of the outcome.
    """
    end_with_parent(parent)
    stop = threading.Event()
    with suppress(KeyboardInterrupt, EOFError), ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        runner = stack.enter_context(BenchmarkRunner(config, replica, device=device, stop=stop))
        specs = runner.workload()
        runner.warm_up(specs)
        pipe.send(runner.planned(specs))
        pipe.recv()  # EOFError where another replica died before the start
        stack.enter_context(stopped_by_signals(stop))
        pipe.send(runner.run(specs, Path(config.output_dir)))
