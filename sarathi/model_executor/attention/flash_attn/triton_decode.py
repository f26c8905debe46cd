"""Decode attention on slots by our split-KV kernel (ops/triton/attention/decode.py)."""

import torch
from torch import Tensor

from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.metadata import DeviceStep, StaticStep
from sarathi.model_executor.ops.triton.attention.cascade import CascadeConfig, CascadeWorkspace
from sarathi.model_executor.ops.triton.attention.decode import (
    DecodeConfig,
    DecodeWorkspace,
    decode_attention,
    distinct_sizes,
)
from sarathi.model_executor.ops.types import CascadeShape, DecodeBatch, NewTokens

HEAD_SIZES = (16, 32, 64, 128, 256)
MAX_GROUP = 16


class TritonDecode:
    """The kernel with its workspace, which all layers share. One instance serves one stream."""

    def __init__(self, head_size: int, device: torch.device, *, pdl: bool = False, config: DecodeConfig | None = None):
        """config: None for the defaults. pdl: overlap its launch with the kernel before it (Hopper and later)."""
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._workspace = DecodeWorkspace.create(num_sms, head_size, device, config)
        self._device, self._head_size, self._scale = device, head_size, head_size**-0.5
        self._pdl = pdl

    @staticmethod
    def supports(num_heads: int, num_kv_heads: int, head_size: int) -> bool:
        """Whether a model's heads fit the kernel."""
        return head_size in HEAD_SIZES and num_heads // num_kv_heads <= MAX_GROUP

    def enable_cascade(self, num_heads: int, num_kv_heads: int, config: CascadeConfig | None = None) -> None:
        """Turn on cascade attention, for a model with these numbers of heads."""
        heads = (num_heads, num_kv_heads, self._head_size)
        room = CascadeWorkspace.create(self._workspace.num_sms, heads, self._device, config)
        self._workspace = self._workspace._replace(cascade=room)

    @property
    def cascade(self) -> CascadeShape | None:
        """The shape of cascade plans; None: cascade attention is off."""
        return None if self._workspace.cascade is None else self._workspace.cascade.shape

    def appends(self, step: DeviceStep, new: NewTokens) -> bool:
        """Whether append_and_attend serves this step: decodes on slots, RoPE over whole heads."""
        return step.is_slot_decode and 2 * new.table.cos.shape[1] == self._head_size

    def warm_up(self, num_heads: int, layer: CacheLayer, fewest: int, most: int) -> None:
        """Compile `attend` for steps of `fewest` to `most` sequences. Touches no memory of the cache."""
        for size in distinct_sizes(fewest, most, self._head_size):
            query = layer.k.new_zeros((size, num_heads, self._head_size))
            for cascade in {None, self.cascade}:
                self.attend(query, layer, StaticStep(size, 1, 0, query.device, cascade=cascade).step)

    def attend(self, query: Tensor, layer: CacheLayer, step: DeviceStep, out: Tensor | None = None) -> Tensor:
        """query: [B, num_heads, head_size], one token per sequence; its key and value are in the cache.

        Returns query's shape; `out`, contiguous, if given.
        """
        return self._attend(query, None, layer, step, out)

    def append_and_attend(self, query: Tensor, new: NewTokens, layer: CacheLayer, step: DeviceStep) -> Tensor:
        """As attend, but RoPE is not yet applied to query and new.keys, and `new` is not yet stored."""
        return self._attend(query, new, layer, step)

    def _attend(
        self, query: Tensor, new: NewTokens | None, layer: CacheLayer, step: DeviceStep, out: Tensor | None = None
    ) -> Tensor:
        if step.slots is None or not step.is_decode:
            raise ValueError("the split-KV kernel takes one new token per sequence, on slots")
        batch = DecodeBatch(step.slots, step.lengths, layer.window, step.cascade)
        return decode_attention(query, layer.k, layer.v, batch, self._scale, self._workspace, new, out, pdl=self._pdl)
