"""Where the ranks of a Ray cluster run: a placement group with one bundle a rank."""

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from sarathi.config.schema import EngineConfig
from sarathi.worker.device import DeviceUnavailableError

_WAIT_S = 60.0


class PlacementError(ValueError):
    """The Ray cluster has no room for the ranks; the message gives the numbers."""


def device_of_ranks(config: EngineConfig) -> str:
    """ "cuda" or "cpu": every rank has one device. "auto" is a GPU where the cluster has one."""
    name = config.model.device
    if name == "auto":
        return "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or device.index is not None:
        raise DeviceUnavailableError(f"device={name!r}: with executor=ray it must be auto, cpu or cuda: Ray chooses")
    return device.type


def reserve(size: int, device: str, strategy: str) -> tuple[PlacementGroup, list[int]]:
    """A placement group, and its bundles in order of rank: those of one machine follow each other, this one's first.

    device: "cuda" or "cpu". strategy: "pack" or "strict_pack". Raises PlacementError where the cluster has too little,
    or nothing is free for a minute.
    """
    kind = "GPU" if device == "cuda" else "CPU"
    has = int(ray.cluster_resources().get(kind, 0))
    if has < size:
        raise PlacementError(f"{size} ranks need {size} {kind}s, and the Ray cluster has {has}")
    group = placement_group([{kind: 1}] * size, strategy=strategy.upper())
    if not group.wait(_WAIT_S):
        remove_placement_group(group)
        free = int(ray.available_resources().get(kind, 0))
        raise PlacementError(
            f"ray_placement={strategy}: for {_WAIT_S:g} s the Ray cluster had no room for {size} ranks of one {kind} "
            f"each; {free} of its {has} {kind}s are free, on {len(ray.nodes())} machines"
        )
    nodes = placement_group_table(group)["bundles_to_node_id"]
    here = ray.get_runtime_context().get_node_id()
    return group, sorted(range(size), key=lambda bundle: (nodes[bundle] != here, nodes[bundle], bundle))
