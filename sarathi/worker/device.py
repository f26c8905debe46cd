"""Which device and numbers a worker uses and how much memory its cache may take; knows no model's layers."""

import os

import torch

from sarathi.config.schema import CacheConfig, ModelConfig
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.placement import Placement

_DEFAULT_BUDGET_BYTES = 4 * 2**30
_SHARE_OF_FREE_RAM = 0.25


class DeviceUnavailableError(ValueError):
    """The device that was asked for is not there."""


def choose_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU where there is none. Raises DeviceUnavailableError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailableError(
            f"device={name!r} is none that torch knows: use 'cpu', 'cuda' or 'cuda:N'"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceUnavailableError(f"device={name!r} is not supported: use 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailableError(f"device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_placement(config: ModelConfig, arch: ModelArchitecture) -> Placement:
    """ "auto" is the checkpoint's own dtype on a GPU and float32 on a CPU, whose matrix products are fastest in it."""
    device = choose_device(config.device)
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else arch.dtype
    return Placement(getattr(torch, name), device)


def cache_budget_bytes(config: CacheConfig, device: torch.device) -> int:
    """The configured budget; else 4 GiB or a quarter of the free RAM on a CPU, what its share leaves on a GPU."""
    if config.memory_bytes is not None:
        return config.memory_bytes
    if device.type == "cpu":
        return min(_DEFAULT_BUDGET_BYTES, int(_free_ram_bytes() * _SHARE_OF_FREE_RAM))
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - int(total * (1 - config.gpu_memory_utilization)))


def _free_ram_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
