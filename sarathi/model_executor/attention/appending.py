"""What a backend does with keys and values that a fused step has just computed. Knows no kernel library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.metadata import DeviceStep, token_places
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.ops.types import CacheTarget, NewTokens

if TYPE_CHECKING:
    from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode


class StepMetadata(Protocol):
    """What the metadata of each of these backends holds."""

    @property
    def step(self) -> DeviceStep: ...

    places: tuple[Tensor, Tensor] | None  # of the new tokens, once the first layer has found them out


class AppendingBackend(ABC):
    """Base of the backends on a GPU.

    _decode: takes the steps that _takes_decode says, and from _fewest_decodes on the decodes that stand before chunks;
    None: there is none such.
    """

    _kernels: Ops
    _decode: TritonDecode | None
    _fewest_decodes: int
    _num_heads: int

    @abstractmethod
    def attend(self, query: Tensor, layer: CacheLayer, metadata: Any) -> Tensor:
        """Attention alone: the step's keys and values are in the cache. query, result: [T, num_heads, head_size]."""

    @abstractmethod
    def _takes_decode(self, metadata: Any) -> bool:
        """Whether every sequence has one new token, on a contiguous slot."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layer: CacheLayer, metadata: Any) -> Tensor:
        """See AttentionBackend."""
        self.store(key, value, layer, metadata)
        return self.attend(query, layer, metadata)

    def target(self, layer: CacheLayer, metadata: StepMetadata) -> CacheTarget:
        """Where the step's keys and values go, for a kernel that stores them before `attend`."""
        if metadata.places is None:
            metadata.places = token_places(metadata.step, layer.k.shape[1])
        return CacheTarget(layer.k, layer.v, *metadata.places)

    def store(self, key: Tensor, value: Tensor, layer: CacheLayer, metadata: Any) -> None:
        """key, value: [T, num_kv_heads, head_size], the step's; the keys are turned already."""
        self._kernels.store(key, value, self.target(layer, metadata))

    def turn_and_store(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: Any
    ) -> None:
        """Turns the queries, in place, and the new keys, and stores what is new; shapes as in append_and_attend."""
        self._kernels.rope_and_store(query, new.keys, new.values, positions, new.table, self.target(layer, metadata))

    def warm_up(self, layer: CacheLayer, max_num_seqs: int) -> None:
        """Compiles what steps with chunks in them need on such a layer; touches no memory in the cache."""
        if self._decode is not None:
            self._decode.warm_up(self._num_heads, layer, self._fewest_decodes, max_num_seqs)

    def append_and_attend(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: Any
    ) -> Tensor:
        """Turns the queries [T, num_heads, head_size] and the new keys to their positions [T], stores, attends."""
        if self._decode is not None and self._takes_decode(metadata) and self._decode.turns(new.table):
            return self._decode.append_and_attend(query, new, layer, metadata.step)
        self.turn_and_store(query, new, positions, layer, metadata)
        return self.attend(query, layer, metadata)
