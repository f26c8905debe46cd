"""Ray resources of a replica."""

from typing import Any

import ray

from sarathi.config.scaling import ScalingConfig
from sarathi.config.schema import EngineConfig
from sarathi.executor.ray.placement import PlacementError, device_of_ranks


def actor_options(engine: EngineConfig, scaling: ScalingConfig) -> dict[str, Any]:
    """Options of a replica's Ray actor: one GPU per rank, or an equal share of the CPUs, at least one per rank. With
    executor=ray the ranks reserve their own."""
    ranks = engine.parallel.tensor_parallel_size * engine.parallel.pipeline_parallel_size
    if engine.parallel.executor == "ray":
        return {"num_cpus": 0}
    if device_of_ranks(engine) == "cuda":
        return {"num_gpus": ranks, "num_cpus": 0}
    return {"num_cpus": _cpus_of_replica(ranks, scaling.max_replicas or scaling.replicas)}


def check_room(engine: EngineConfig, scaling: ScalingConfig) -> None:
    """Raise PlacementError if the cluster currently has too few resources for `replicas`."""
    options = actor_options(engine, scaling)
    for kind, name in (("GPU", "num_gpus"), ("CPU", "num_cpus")):
        count = options.get(name, 0)
        if count and _room(kind, count) < scaling.replicas:
            raise PlacementError(
                f"replicas is {scaling.replicas}: each needs {count} {kind}s of one machine, and the Ray cluster has "
                f"room for {_room(kind, count)}"
            )


def _cpus_of_replica(ranks: int, replicas: int) -> int:
    most = int(max(_of_machines("CPU"), default=0))
    return next((count for count in range(most, ranks, -1) if _room("CPU", count) >= replicas), ranks)


def _room(kind: str, count: int) -> int:
    """How many replicas that need `count` of a resource fit on the machines."""
    return sum(int(has) // count for has in _of_machines(kind))


def _of_machines(kind: str) -> list[float]:
    return [each["Resources"].get(kind, 0) for each in ray.nodes() if each["Alive"]]
