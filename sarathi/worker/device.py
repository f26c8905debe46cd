"""Device, dtypes and attention backend of a worker, from the configuration and the machine."""

import torch

from sarathi.config.backend import AUTO, BackendSpec
from sarathi.config.schema import CacheConfig, ModelConfig
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.placement import Placement


class DeviceUnavailableError(ValueError):
    """The configured device does not exist on this machine."""


class CacheDtypeError(ValueError):
    """No attention kernel reads a cache of this dtype."""


def choose_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU where there is none. Raises DeviceUnavailableError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailableError(f"device={name!r} is unknown to torch: use 'cpu', 'cuda' or 'cuda:N'") from error
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


def attention_backend(config: ModelConfig) -> BackendSpec:
    """The configured backend; "auto" is resolved for the configured device."""
    return config.attention_backend.on(choose_device(config.device).type)


def choose_cache_dtype(config: CacheConfig, place: Placement) -> torch.dtype:
    """ "auto" is the dtype of weights and activations."""
    dtype: torch.dtype = place.dtype if config.kv_cache_dtype == AUTO else getattr(torch, config.kv_cache_dtype)
    if dtype != place.dtype:
        name = place.dtype_name
        raise CacheDtypeError(
            f"kv_cache_dtype={config.kv_cache_dtype}: no attention kernel reads a cache of a dtype other than the "
            f"activations', {name}; use auto or {name}"
        )
    return dtype
