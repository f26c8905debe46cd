"""Memory of a device: what is there, what is free, and how much of it the KV cache takes."""

import os
from pathlib import Path

import torch

from sarathi.config.schema import CacheConfig

_DEFAULT_BUDGET_BYTES = 4 * 2**30
_SHARE_OF_FREE_RAM = 0.25
_START_TOKENS = 32768  # of the largest step of the warm-up, on a cache that grows afterwards
_START_BYTES = 4 * 2**30  # room for the pages of many regions beside them


class MemoryLimitError(ValueError):
    """Model or cache are larger than the device's memory; the message gives the numbers."""


def check_budget(config: CacheConfig, device: torch.device) -> None:
    """Raise MemoryLimitError where memory_bytes is more than the device has."""
    total = total_bytes(device)
    if config.memory_bytes is not None and config.memory_bytes > total:
        raise MemoryLimitError(
            f"memory_bytes={config.memory_bytes} is more than {device} can give: it has {total} bytes in all"
        )


def check_weights(num_parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise MemoryLimitError where the weights need more memory than is free, before any of it is taken."""
    needed, free = num_parameters * dtype.itemsize, free_bytes(device)
    if needed > free:
        name = str(dtype).removeprefix("torch.")
        raise MemoryLimitError(
            f"the model's weights do not fit: {num_parameters} parameters x {dtype.itemsize} bytes ({name}) are "
            f"{needed / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB free; use a smaller model or dtype"
        )


def cache_budget_bytes(config: CacheConfig, device: torch.device) -> int:
    """memory_bytes; else 4 GiB or a quarter of what is free on a CPU, what gpu_memory_utilization leaves on a GPU."""
    if config.memory_bytes is not None:
        return config.memory_bytes
    if device.type == "cpu":
        return min(_DEFAULT_BUDGET_BYTES, int(free_bytes(device) * _SHARE_OF_FREE_RAM))
    return max(0, free_bytes(device) - int(total_bytes(device) * (1 - config.gpu_memory_utilization)))


def initial_budget_bytes(config: CacheConfig, device: torch.device, token_bytes: int, *, can_grow: bool) -> int:
    """The budget before the warm-up: enough for its largest step where the cache takes the rest of a GPU afterwards.

    token_bytes: of one token in all layers.
    """
    budget = cache_budget_bytes(config, device)
    if device.type == "cpu" or not can_grow or config.memory_bytes is not None:
        return budget
    return min(budget, _START_BYTES + _START_TOKENS * token_bytes)


def final_budget_bytes(config: CacheConfig, device: torch.device, initial_bytes: int) -> int:
    """The budget after the warm-up, when what is free on a GPU stays free."""
    if device.type == "cpu" or config.memory_bytes is not None:
        return initial_bytes
    return initial_bytes + cache_budget_bytes(config, device)


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated now: of a GPU, or of RAM within the limits of this process's cgroups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_available_ram(), *(limit - used for limit, used in cgroup_limits())])


def total_bytes(device: torch.device) -> int:
    """Bytes of the GPU, or of RAM that this process may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min([_sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in cgroup_limits())])


def cgroup_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each memory cgroup of this process, v1 and v2; page cache does not count as used.

    A limit may be set at any ancestor. In a container the path in /proc may be the host's; its mount then starts at
    the container's own cgroup, which is an ancestor of every path.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = base / path.lstrip("/")
        folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
        found += [limit for folder in folders if (limit := _limit(folder, *names))]
    return found


def _limit(folder: Path, limit_name: str, used_name: str, cache_name: str) -> tuple[int, int] | None:
    """None where the cgroup sets no limit."""
    try:
        limit, used = int((folder / limit_name).read_text()), int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # absent, or "max"
        return None
    return limit, used - int(stat.get(cache_name, 0))


def _available_ram() -> int:
    """What the kernel estimates can be had without swapping, page cache included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return _sysconf("SC_AVPHYS_PAGES")
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) * 1024


def _sysconf(name: str) -> int:
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
