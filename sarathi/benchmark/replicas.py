"""Run on one engine, or on several replicas, each in a process of its own, that start together."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.outcome import RunOutcome
from sarathi.benchmark.processes import ENDING, Terminated, end_with_parent, ended_by_signals
from sarathi.benchmark.runner import BenchmarkRunner
from sarathi.config.knobs import ConfigError

START_TIMEOUT_S = 1800.0  # the slowest replica has loaded its model by then


class ReplicaError(RuntimeError):
    """A replica ended without a result; its own message is on stderr."""


def run_all(configs: Sequence[BenchmarkConfig]) -> Iterator[list[RunOutcome]]:
    """For each configuration the outcome of each replica, in their order. ReplicaError where one of several died.

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


def _run_processes(config: BenchmarkConfig, devices: Mapping[str, str]) -> list[RunOutcome]:
    context, count = mp.get_context("spawn"), config.cluster.num_replicas
    start = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    arguments = [(config, i, devices.get(str(i)), start, pipes[i][1], os.getpid()) for i in range(count)]
    processes = [context.Process(target=_run_replica, args=each, name=f"replica {each[1]}") for each in arguments]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        return [_receive(replica, receiver, processes) for replica, (receiver, _) in enumerate(pipes)]
    finally:
        for process in processes:
            if process.pid is not None:
                process.join(timeout=10)
                process.kill()


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


def _receive(replica: int, receiver: Connection, processes: Sequence[SpawnProcess]) -> RunOutcome:
    """Wait through one interrupt, which replicas answer with what they have. KeyboardInterrupt if they have nothing."""
    try:
        return _outcome(replica, receiver)
    except KeyboardInterrupt as interrupt:
        for process in processes if isinstance(interrupt, Terminated) else ():
            process.terminate()  # ^C reaches them by itself
    try:
        return _outcome(replica, receiver)
    except ReplicaError:
        raise KeyboardInterrupt from None


def _outcome(replica: int, receiver: Connection) -> RunOutcome:
    try:
        outcome: RunOutcome = receiver.recv()
    except EOFError:
        raise ReplicaError(f"replica {replica} ended without a result") from None
    return outcome
