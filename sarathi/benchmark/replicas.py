"""Run on one engine, or on several replicas, each in a process of its own, that start together."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.outcome import DIED, Planned, RunOutcome
from sarathi.benchmark.processes import ENDING, Terminated, end_with_parent, ended_by_signals
from sarathi.benchmark.runner import BenchmarkRunner
from sarathi.config.knobs import ConfigError

START_TIMEOUT_S = 1800.0  # the slowest replica has loaded its model by then


class ReplicaError(RuntimeError):
    """A replica ended without a result; its own message is on stderr."""


def run_all(configs: Sequence[BenchmarkConfig]) -> Iterator[list[RunOutcome]]:
    """For each configuration the outcome of each replica, in their order. ReplicaError where one died before its start.

    The configurations differ in their workload alone: one engine serves them all, but replicas are made anew.
    """
    devices = replica_devices(configs[0])
    for config in configs:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    if configs[0].cluster.num_replicas > 1:
        yield from (_run_processes(config, devices) for config in configs)
        return
    with BenchmarkRunner(configs[0], device=devices.get("0")) as runner:
        for config in configs:
            yield [runner.run(runner.workload(config), Path(config.output_dir))]


def replica_devices(config: BenchmarkConfig) -> Mapping[str, str]:
    """Replica -> device, as replica_resource_mapping gives it; replicas not in it use model.device."""
    text = config.replica_resource_mapping
    try:
        mapping = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"replica_resource_mapping is {text!r}: it is not JSON ({error})") from None
    replicas = [str(index) for index in range(config.cluster.num_replicas)]
    good = isinstance(mapping, dict) and set(mapping) <= set(replicas)
    if not good or not all(isinstance(device, str) for device in mapping.values()):
        raise ConfigError(f"replica_resource_mapping is {text!r}: it must map {', '.join(replicas)} to devices")
    return mapping


class _Replica:
    """A replica's process, the pipe of its result, and the requests that it is to serve."""

    def __init__(self, number: int, process: SpawnProcess, receiver: Connection) -> None:
        self._number, self._process, self._receiver = number, process, receiver
        self._planned: Planned | None = None
        self._outcome: RunOutcome | None = None

    def start(self, sender: Connection) -> None:
        self._process.start()
        sender.close()

    def plan(self) -> None:
        """Wait until it is about to start. Raises ReplicaError."""
        self._planned = self._planned or self._receive()

    def outcome(self) -> RunOutcome:
        """Wait for its result. Where it died after its start, its requests are lost. May be called again."""
        self.plan()
        if self._outcome is None:
            self._outcome = self._result()
        return self._outcome

    def terminate(self) -> None:
        self._process.terminate()

    def end(self) -> None:
        if self._process.pid is not None:
            self._process.join(timeout=10)
            self._process.kill()

    def _result(self) -> RunOutcome:
        try:
            outcome: RunOutcome = self._receive()
        except ReplicaError as error:
            print(f"benchmark: {error}; {len(self._planned or ())} requests are lost", file=sys.stderr)
            return RunOutcome(DIED, 0.0, 0, {}, [], None, self._planned or ())
        return outcome

    def _receive(self) -> Any:
        try:
            return self._receiver.recv()
        except (EOFError, ConnectionError):
            raise ReplicaError(f"replica {self._number} ended without a result") from None


def _run_processes(config: BenchmarkConfig, devices: Mapping[str, str]) -> list[RunOutcome]:
    context, count = mp.get_context("spawn"), config.cluster.num_replicas
    start = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    arguments = [(config, i, devices.get(str(i)), start, pipes[i][1], os.getpid()) for i in range(count)]
    processes = [context.Process(target=_run_replica, args=each, name=f"replica {each[1]}") for each in arguments]
    replicas = [_Replica(i, processes[i], pipes[i][0]) for i in range(count)]
    try:
        for replica, (_, sender) in zip(replicas, pipes, strict=True):
            replica.start(sender)
        return _outcomes(replicas, start)
    finally:
        for replica in replicas:
            replica.end()


def _outcomes(replicas: Sequence[_Replica], start: Any) -> list[RunOutcome]:
    """Of all replicas. Raises ReplicaError where one died before the start, or no one has a result.

    Waits through one interrupt, which replicas answer with what they have. KeyboardInterrupt if they have nothing.
    """
    try:
        for replica in replicas:
            replica.plan()
        outcomes = [replica.outcome() for replica in replicas]
    except ReplicaError:
        start.abort()
        raise
    except KeyboardInterrupt as interrupt:
        for replica in replicas if isinstance(interrupt, Terminated) else ():
            replica.terminate()  # ^C reaches them by itself
        outcomes = _after_interrupt(replicas)
    if all(outcome.ended == DIED for outcome in outcomes):
        raise ReplicaError("every replica ended without a result")
    return outcomes


def _after_interrupt(replicas: Sequence[_Replica]) -> list[RunOutcome]:
    try:
        outcomes = [replica.outcome() for replica in replicas]
    except ReplicaError:
        raise KeyboardInterrupt from None
    if any(outcome.ended == DIED for outcome in outcomes):
        raise KeyboardInterrupt
    return outcomes


def _run_replica(
    config: BenchmarkConfig, replica: int, device: str | None, start: Any, sender: Connection, parent: int
) -> None:
    """In a process of its own; ^C and SIGTERM end its run with what there is.

    A replica that is done before the others waits until its result is taken: no signal must end it then.
    """
    end_with_parent(parent)
    try:
        with ended_by_signals(), BenchmarkRunner(config, replica, device) as runner:
            specs = runner.workload()
            runner.warm_up(specs)
            sender.send(runner.planned(specs))
            start.wait(START_TIMEOUT_S)
            outcome = runner.run(specs, Path(config.output_dir))
            for number in (signal.SIGINT, *ENDING):
                signal.signal(number, signal.SIG_IGN)
            sender.send(outcome)
    except KeyboardInterrupt:
        start.abort()
    except BaseException:
        start.abort()
        raise
