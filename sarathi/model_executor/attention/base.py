"""What an attention backend is, and the factory."""

import importlib
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.placement import Placement

Metadata = Any  # what a backend's own plan() made for its own forward()


class AttentionBackend(Protocol):
    """A kernel. Holds nothing of a step: what a step needs is in the metadata."""

    def plan(self, batch: Batch, address: Address) -> Metadata:
        """Once a step, before the model: every index, mask and length that the layers share."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layer: CacheLayer, metadata: Metadata) -> Tensor:
        """Once a layer: stores key and value, [T, num_kv_heads, D], then attends: query, result [T, num_heads, D]."""


class KernelUnavailableError(ValueError):
    """The kernel cannot run here; the message says what would make it, or which one can."""


class _Kernel(NamedTuple):
    module: str
    devices: tuple[str, ...]
    package: str  # what to install; "" where nothing is needed


_PACKAGE = "sarathi.model_executor.attention"
_KERNELS = {
    "sdpa": _Kernel(f"{_PACKAGE}.sdpa.backend", ("cpu", "cuda"), ""),
    "no_op": _Kernel(f"{_PACKAGE}.no_op", ("cpu", "cuda"), ""),
    "fa": _Kernel(f"{_PACKAGE}.flash_attn.backend", ("cuda",), "fa3-fwd"),
    "fa2": _Kernel(f"{_PACKAGE}.flash_attn.backend", ("cuda",), "flash-attn"),
    "fa3": _Kernel(f"{_PACKAGE}.flash_attn.backend", ("cuda",), "fa3-fwd"),
    "fa4": _Kernel(f"{_PACKAGE}.flash_attn.backend", ("cuda",), "flash-attn-4"),
    "fi": _Kernel(f"{_PACKAGE}.flashinfer.backend", ("cuda",), "flashinfer-python"),
}


def create_backend(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> AttentionBackend:
    """The backend of `spec.kernel`; its module is imported here, and with it any optional package.

    Raises KernelUnavailableError where the device is wrong or the package is missing.
    """
    kernel, device = _KERNELS[spec.kernel], place.device.type
    if device not in kernel.devices:
        raise KernelUnavailableError(
            f"attention backend '{spec}': kernel {spec.kernel!r} runs on {', '.join(kernel.devices)}, not on {device}; "
            f"on {device} use {', '.join(name for name, other in _KERNELS.items() if device in other.devices)}"
        )
    try:
        module = importlib.import_module(kernel.module)
    except ImportError as error:
        raise KernelUnavailableError(f"attention backend '{spec}': {error}; pip install {kernel.package}") from error
    backend: AttentionBackend = module.create(spec, arch, place)
    return backend
