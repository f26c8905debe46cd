"""Runs on one engine in this process, or on several replicas."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.replicas.base import Replica, plan_together, run_together
from sarathi.benchmark.replicas.process import started_processes
from sarathi.benchmark.run.outcome import RunOutcome
from sarathi.benchmark.run.processes import ended_by_signals, held_signals, stopped_by_signals
from sarathi.benchmark.run.runner import BenchmarkRunner
from sarathi.config.knobs import ConfigError


def run_all(configs: Sequence[BenchmarkConfig]) -> Iterator[list[RunOutcome]]:
    """For each configuration the outcome of each replica, in their order. ReplicaError where one died before its start.

    The configurations differ in their workload alone: one engine serves them all, but replicas are started for each. A
    signal that arrives while the caller writes an outcome raises KeyboardInterrupt at the next iteration, not before.
    """
    devices = replica_devices(configs[0])
    for config in configs:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    if configs[0].cluster.num_replicas > 1:
        yield from _run_replicas(configs, devices)
    else:
        yield from _run_engine(configs, devices.get("0"))


def _run_engine(configs: Sequence[BenchmarkConfig], device: str | None) -> Iterator[list[RunOutcome]]:
    stop = threading.Event()
    with BenchmarkRunner(configs[0], device=device, stop=stop) as runner:
        for config in configs:
            specs = runner.workload(config)
            runner.warm_up(specs)
            with stopped_by_signals(stop):
                outcomes = [runner.run(specs, Path(config.output_dir))]
                with held_signals(stop):
                    yield outcomes
            if stop.is_set():
                raise KeyboardInterrupt


def _run_replicas(configs: Sequence[BenchmarkConfig], devices: Mapping[str, str]) -> Iterator[list[RunOutcome]]:
    stop = threading.Event()
    for config in configs:
        with stopped_by_signals(stop):
            outcomes = _serve_on_replicas(config, devices, stop)
            with held_signals(stop):
                yield outcomes
        if stop.is_set():
            raise KeyboardInterrupt


def _serve_on_replicas(config: BenchmarkConfig, devices: Mapping[str, str], stop: threading.Event) -> list[RunOutcome]:
    with ExitStack() as stack:
        with ended_by_signals():
            replicas = stack.enter_context(_started(config, devices))
            plan_together(replicas, stop)
        return run_together(replicas, stop)


def replica_devices(config: BenchmarkConfig) -> Mapping[str, str]:
    """Replica -> device from replica_resource_mapping; replicas without an entry use model.device."""
    text = config.replica_resource_mapping
    try:
        mapping = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"replica_resource_mapping is {text!r}: it is not JSON ({error})") from None
    replicas = [str(index) for index in range(config.cluster.num_replicas)]
    good = isinstance(mapping, dict) and set(mapping) <= set(replicas)
    if not good or not all(isinstance(device, str) for device in mapping.values()):
        raise ConfigError(f"replica_resource_mapping is {text!r}: it must map {', '.join(replicas)} to devices")
    if mapping and config.cluster.executor == "ray":
        raise ConfigError(
            f"replica_resource_mapping is {text!r}: it must be empty with cluster.executor ray, which places"
        )
    return mapping


def _started(config: BenchmarkConfig, devices: Mapping[str, str]) -> AbstractContextManager[Sequence[Replica]]:
    if config.cluster.executor != "ray":
        return started_processes(config, devices)
    from sarathi.benchmark.replicas.actor import started_actors  # Ray is an optional package

    return started_actors(config)
