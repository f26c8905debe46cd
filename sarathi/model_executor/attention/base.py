"""The interface of attention backends, and their factory."""

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.attention.metadata import DeviceStep
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.ops.types import CascadeShape, NewTokens
from sarathi.model_executor.placement import Placement

Metadata = Any  # of the backend's own type: only the backend that made it reads it


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Properties of a backend that its caller needs before the first step.

    captures_cuda_graphs: whether `plan_static` is implemented; `can_capture` tells whether it serves a given cache.
    over_read_tokens: how far kernels may read past a sequence's last token; the cache needs memory there.
    """

    captures_cuda_graphs: bool = False
    over_read_tokens: int = 0


class AttentionBackend(ABC):
    """Attention over the KV cache. A step's state is in its metadata, not in the backend.

    T new tokens of all sequences are concatenated. Queries are [T, num_heads, head_size], new keys and values
    [T, num_kv_heads, head_size]. One instance serves one stream.
    """

    capabilities: Capabilities
    _ops: Ops

    @abstractmethod
    def plan(self, batch: Batch, address: Address) -> Metadata:
        """Metadata of a step, computed once before the model runs: indices, masks and lengths shared by all layers."""

    def enable_cascade(self) -> bool:
        """Turn on cascade attention: decodes read shared tokens once. Returns False if the backend lacks it."""
        return False

    @property
    def cascade(self) -> CascadeShape | None:
        """The shape of cascade plans; None without cascade attention."""
        return None

    def plan_static(self, step: DeviceStep) -> Metadata:
        """Metadata of a decode step whose tensors stay in place and are refilled between replays of a CUDA graph."""
        raise NotImplementedError(f"{type(self).__name__} does not capture CUDA graphs")

    def can_capture(self, layer: CacheLayer) -> bool:
        """Whether decode steps on layers with these strides can be captured in a CUDA graph."""
        return self.capabilities.captures_cuda_graphs

    @abstractmethod
    def attend(self, query: Tensor, layer: CacheLayer, metadata: Metadata) -> Tensor:
        """Attend with rotated queries; the cache holds the step's keys and values already. Returns query's shape."""

    def append_and_attend(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: Metadata
    ) -> Tensor:
        """Apply RoPE to queries and new keys, in place, store the new keys and values, attend. Returns query's shape.

        positions: [T] integers.
        """
        self.rope_and_store(query, new, positions, layer, metadata)
        return self.attend(query, layer, metadata)

    def rope_and_store(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: Metadata
    ) -> None:
        """The first half of `append_and_attend`."""
        self._ops.rope_and_store(query, new.keys, new.values, positions, new.table, metadata.target(layer))

    def warm_up(self, layer: CacheLayer, max_num_seqs: int) -> None:  # noqa: B027
        """Compile kernels that steps on such a layer need outside of CUDA graphs. Touches no memory of the cache."""


class KernelUnavailableError(ValueError):
    """The kernel cannot run here; the message names what is missing and the kernels that can run."""


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
    """Create the backend of `spec.kernel`. Imports its module, and with it any optional package.

    Raises KernelUnavailableError if the kernel does not run on the device or the package is missing.
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
