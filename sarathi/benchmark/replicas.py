"""A run on one engine, or on several in processes of their own that start together. Knows no engine's inside."""

from __future__ import annotations

import json
import multiprocessing as mp
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.outcome import RunOutcome
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
    context = mp.get_context("spawn")
    start = context.Barrier(config.cluster.num_replicas)
    processes, results = [], []
    for replica in range(config.cluster.num_replicas):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (config, replica, devices.get(str(replica)), start, sender)
        process = context.Process(target=_run_replica, args=arguments, name=f"replica {replica}")
        process.start()
        sender.close()
        processes.append(process)
        results.append(receiver)
    try:
        return [_receive(replica, receiver) for replica, receiver in enumerate(results)]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def _run_replica(config: BenchmarkConfig, replica: int, device: str | None, start: Any, sender: Connection) -> None:
    """In a process of its own; ^C reaches it too, and ends its run with what there is.

    A replica that is done before the others waits until its result is taken: ^C must not end it then.
    """
    try:
        with BenchmarkRunner(config, replica, device) as runner:
            specs = runner.workload()
            runner.warm_up(specs)
            start.wait(START_TIMEOUT_S)
            outcome = runner.run(specs, Path(config.output_dir))
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sender.send(outcome)
    except KeyboardInterrupt:
        start.abort()
    except BaseException:
        start.abort()
        raise


def _receive(replica: int, receiver: Connection) -> RunOutcome:
    """Waits through one ^C: the replicas answer it with what they have. KeyboardInterrupt where that is nothing."""
    with suppress(KeyboardInterrupt):
        return _outcome(replica, receiver)
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
