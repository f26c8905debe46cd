"""Where the ranks of a Ray cluster run: a placement group with one bundle a rank."""

from typing import NamedTuple

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


class Reservation(NamedTuple):
    """A placement group, and its bundles in order of rank. is_own: it was made for these ranks alone."""

    group: PlacementGroup
    bundles: list[int]
    is_own: bool

    def release(self) -> None:
        """Give the devices back, where no one else uses the group. May be called again."""
        if self.is_own and ray.is_initialized():
            remove_placement_group(self.group)


def check_room(needs: str, count: int, device: str) -> None:
    """Raise PlacementError where the cluster has fewer devices than `count`, busy or not. needs: who needs them."""
    kind = _kind_of(device)
    has = int(ray.cluster_resources().get(kind, 0))
    if has < count:
        raise PlacementError(f"{needs} {count} {kind}s, and the Ray cluster has {has}")


def reserve(size: int, device: str, strategy: str) -> Reservation:
    """A bundle for each rank, in order of rank: those of one machine follow each other, this one's first.

    Within an actor that has a placement group with so many devices, as a replica of Ray Serve may have, that group is
    used. device: "cuda" or "cpu". strategy: "pack" or "strict_pack". Raises PlacementError where the cluster has too
    little, or nothing is free for a minute.
    """
    kind = _kind_of(device)
    group = ray.util.get_current_placement_group()
    is_own = group is None or len(_bundles(group, kind)) < size
    if is_own:
        group = _new_group(size, device, strategy)
    assert group is not None
    nodes = placement_group_table(group)["bundles_to_node_id"]
    here = ray.get_runtime_context().get_node_id()
    order = sorted(_bundles(group, kind), key=lambda bundle: (nodes[bundle] != here, nodes[bundle], bundle))
    return Reservation(group, order[:size], is_own)


def _new_group(size: int, device: str, strategy: str) -> PlacementGroup:
    check_room(f"{size} ranks need", size, device)
    kind = _kind_of(device)
    group: PlacementGroup = placement_group([{kind: 1}] * size, strategy=strategy.upper())
    if not group.wait(_WAIT_S):
        remove_placement_group(group)
        has, free = (int(found.get(kind, 0)) for found in (ray.cluster_resources(), ray.available_resources()))
        raise PlacementError(
            f"ray_placement={strategy}: for {_WAIT_S:g} s the Ray cluster had no room for {size} ranks of one {kind} "
            f"each; {free} of its {has} {kind}s are free, on {len(ray.nodes())} machines"
        )
    return group


def _bundles(group: PlacementGroup, kind: str) -> list[int]:
    """Those that hold a device for a rank."""
    return [index for index, bundle in enumerate(group.bundle_specs) if bundle.get(kind, 0) >= 1]


def _kind_of(device: str) -> str:
    """What Ray calls it."""
    return "GPU" if device == "cuda" else "CPU"
