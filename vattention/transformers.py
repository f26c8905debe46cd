"""A cache for `generate` of the transformers library with K and V in a `VirtualKVCache`."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from vattention.arguments import byte_count, integer, positive
from vattention.kv_cache import VirtualKVCache
from vattention.stats import CacheStats


class VirtualCache(Cache):
    """A transformers `Cache` that grows without copying: sequence i of the batch is slot i of a `VirtualKVCache`.

    Pass it to `model.generate(..., past_key_values=cache)` or to the model itself, under `torch.no_grad()`. The first
    keys determine the number of KV heads, head size, dtype and device, and reserve the addresses. Sliding window layers
    keep all tokens and attend to the window. Beam search reorders in place; assisted generation crops. With
    `torch.compile` use a StaticCache.

    Args:
        config: the model's; each layer must be full or sliding window attention, with K and V of one size.
        max_tokens: of the longest sequence, padding included. It costs address space, not memory.
        budget_bytes: physical memory for K and V together; OutOfMemoryError when the sequences need more.
        max_batch_size: sequences at once; in beam search batch size times num_beams.
        page_bytes: as for VirtualKVCache.

    Raises ValueError for a model that it cannot serve, and later for another batch size, head size, dtype or device.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_tokens: int,
        budget_bytes: int,
        max_batch_size: int = 64,
        page_bytes: int | None = None,
    ) -> None:
        self._reserve = partial(
            VirtualKVCache,
            num_slots=positive("max_batch_size", max_batch_size),
            max_tokens=positive("max_tokens", max_tokens),
            budget_bytes=byte_count("budget_bytes", budget_bytes),
            page_bytes=None if page_bytes is None else byte_count("page_bytes", page_bytes, least=1),
        )
        self._memory: VirtualKVCache | None = None
        self._is_closed = False
        self._batch_size = 0  # slots in use: 0 to _batch_size - 1
        self._attention = [_VirtualLayer(self, *each) for each in enumerate(_windows(config))]
        super().__init__(layers=[*self._attention])

    def __repr__(self) -> str:
        memory = "closed" if self._is_closed else self._memory or "no memory yet"
        return f"VirtualCache({self._batch_size} sequences of {self.get_seq_length()} tokens, {memory})"

    def stats(self) -> CacheStats:
        """Memory mapped, used and wasted. Raises ValueError before the first token."""
        if self._memory is None:
            raise ValueError("the cache has no memory before the first token")
        return self._memory.stats()

    def write(
        self, index: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores tokens of layer `index` from position `start` on; returns views of its K and V up to their end.

        All are [batch, num_kv_heads, tokens, head size].
        """
        memory, (batch, _, tokens, _) = self._open(keys), keys.shape
        self._check(memory, keys, values)
        end = start + tokens
        memory.prepare(range(batch), [end] * batch)
        k, v = (each[:batch, :end].transpose(1, 2) for each in memory.layer(index))
        k[:, :, start:].copy_(keys)
        v[:, :, start:].copy_(values)
        return k, v

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes a copy of sequence beam_idx[i]; beam_idx: [batch] integers."""
        self._copy_from(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times: a, b become a, a, b, b."""
        self._copy_from(torch.arange(self._batch_size).repeat_interleave(positive("repeats", repeats)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these sequences, in this order. indices: integers, or a boolean for each sequence."""
        if self._batch_size > 0:
            self._copy_from(torch.arange(self._batch_size)[torch.as_tensor(indices, device="cpu")])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens of every sequence; the number is 0 or negative."""
        if integer("tokens_to_remove", tokens_to_remove) > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}: it must be 0 or negative, -n to remove n tokens")
        if tokens_to_remove == 0 or self._memory is None:
            return
        for layer in self._attention:
            layer.length = max(0, layer.length + tokens_to_remove)
        self._wait_for_kernels()
        for slot in range(self._batch_size):
            self._memory.trim(slot, self.get_seq_length())

    def reset(self) -> None:
        """Forgets every sequence. Their pages stay mapped for the next batch, which may have another size."""
        self._shrink(0)
        for layer in self._attention:
            layer.length = 0

    def close(self) -> None:
        """Releases all memory; a `with` block does it too. Idempotent."""
        self.reset()
        self._is_closed = True
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def __enter__(self) -> VirtualCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a VirtualCache cannot be copied or pickled: crop() it to the tokens that the texts share, or use one "
            "cache for each text"
        )

    def _open(self, keys: torch.Tensor) -> VirtualKVCache:
        """The KV cache, created for keys like these at the first call, with a slot for each sequence."""
        if self._is_closed:
            raise ValueError("the cache is closed")
        batch, heads, _, head_size = keys.shape
        if self._memory is None:
            self._memory = self._reserve(
                num_layers=len(self), num_kv_heads=heads, head_size=head_size, dtype=keys.dtype, device=keys.device
            )
            self._device = keys.device
        if self._batch_size == 0:
            self._grow(self._memory, batch)
        return self._memory

    def _copy_from(self, sources: torch.Tensor) -> None:
        """Sequence i becomes a copy of sequence sources[i]; the batch becomes as large as sources."""
        memory, before, after = self._memory, self._batch_size, len(sources)
        if memory is None or before == 0:
            return
        if after == 0:
            raise ValueError("no sequence would be left; call reset() to remove all of them")
        self._grow(memory, after)
        for index, layer in enumerate(self._attention):
            for each in memory.layer(index):
                held = each[:before, : layer.length].index_select(0, sources.to(each.device))
                each[:after, : layer.length].copy_(held)
        self._shrink(after)

    def _grow(self, memory: VirtualKVCache, batch: int) -> None:
        """Claims slots up to this batch size, prepared for as many tokens as the others have."""
        if batch > memory.num_slots:
            raise ValueError(f"max_batch_size is {memory.num_slots}: the batch (with beams) has {batch}")
        added = range(self._batch_size, batch)
        for slot in added:
            memory.claim(slot)
        try:
            memory.prepare(added, [self.get_seq_length()] * len(added))
        except MemoryError:
            for slot in added:
                memory.free(slot)
            raise
        self._batch_size = max(self._batch_size, batch)

    def _shrink(self, batch: int) -> None:
        """Frees the slots past this batch size."""
        if self._memory is None or batch >= self._batch_size:
            return
        self._wait_for_kernels()
        for slot in range(batch, self._batch_size):
            self._memory.free(slot)
        self._batch_size = batch

    def _check(self, memory: VirtualKVCache, *states: torch.Tensor) -> None:
        expected = (self._batch_size, memory.num_kv_heads, memory.head_size)
        for each in states:
            got = (each.shape[0], each.shape[1], each.shape[3])
            if got != expected or each.dtype != memory.dtype or each.device != self._device:
                raise ValueError(
                    f"keys and values must be of (batch, KV heads, head size) {expected}, {memory.dtype} and "
                    f"{self._device}, as the first ones were; got {got}, {each.dtype} and {each.device}"
                )
            if each.requires_grad:
                raise ValueError("VirtualCache is for inference: call the model under torch.no_grad()")

    def _wait_for_kernels(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _VirtualLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a VirtualCache; `window` is its sliding window in tokens, or None."""

    def __init__(self, cache: VirtualCache, index: int, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache, self._index, self._window = cache, index, window
        self.is_sliding = window is not None
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens; returns K and V for their queries, [batch, num_kv_heads, tokens, head size] each."""
        first = self._first_visible()
        keys, values = self._cache.write(self._index, self.length, key_states, value_states)
        self.length += key_states.shape[-2]
        return keys[:, :, first:], values[:, :, first:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible()
        return self.length + query_length - first, first

    def get_seq_length(self) -> int:
        return self.length

    def _first_visible(self) -> int:
        """The first position that the next token attends to; the window includes that token."""
        return 0 if self._window is None else max(0, self.length - self._window + 1)


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Sliding window of each layer in tokens, or None. Raises ValueError for layers without K and V of their own."""
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config must be a model's configuration (model.config), got {type(config).__name__}")
    if config.is_encoder_decoder:
        raise ValueError(f"VirtualCache serves decoder-only models; {config.model_type} has an encoder")
    config = config.get_text_config(decoder=True)
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"VirtualCache needs K and V in every layer; layers of {config.model_type} share them")
    window = getattr(config, "sliding_window", None)
    default = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or default
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types of {config.model_type} has {', '.join(sorted(unknown))}: "
            "VirtualCache serves full_attention and sliding_attention"
        )
    return [window if each == "sliding_attention" else None for each in types]
