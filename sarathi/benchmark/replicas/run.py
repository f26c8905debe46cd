"""Runs on one engine in this process, or on replicas elsewhere, which start together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.replicas.base import Replica, run_together
from sarathi.benchmark.replicas.process import started_processes
from sarathi.benchmark.run.outcome import RunOutcome
from sarathi.benchmark.run.runner import BenchmarkRunner
from sarathi.config.knobs import ConfigError


def run_all(configs: Sequence[BenchmarkConfig]) -> Iterator[list[RunOutcome]]:
    """For each configuration the outcome of each replica, in their order. ReplicaError where one died before its start.

    The configurations differ in their workload alone: one engine serves them all, but replicas are made anew.
    """
    devices = replica_devices(configs[0])
    for config in configs:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    if configs[0].cluster.num_replicas > 1:
        for config in configs:
            with _started(config, devices) as replicas:
                outcomes = run_together(replicas)
            yield outcomes
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
