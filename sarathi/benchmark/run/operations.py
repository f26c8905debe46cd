"""Times of single operations: of one layer of the decoder, and of what comes before and after all layers.

The probe hooks methods of the decoder's parts, on one layer only, which keeps the cost small. Names are those of
Sarathi-Serve's metrics store; README.md tells which of them contain others, and which are absent. Multiply the times of
a layer by the number of layers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch

from sarathi.executor.base import Executor
from sarathi.messages import Chunk, CompletedStep, MemoryStats, SchedulerOutput
from sarathi.metrics import MetricsStore
from sarathi.model_executor.models.decoder import Decoder

ATTENTION, ROPE, SAVE, ACTIVATION = "attn", "attn_rope", "attn_kv_cache_save", "mlp_activation"
LAYER_OPERATIONS = {  # name: (path from the layer to a part, method of the part)
    "input_layernorm": ("input_norm", "__call__"),
    "attn_pre_proj": ("attention.qkv", "__call__"),
    ROPE: ("attention.backend", "rope_and_store"),
    SAVE: ("attention.backend", "store"),
    ATTENTION: ("attention.backend", "append_and_attend"),
    "attn_post_proj": ("attention.output", "add_to"),
    "post_attention_layernorm": ("post_norm", "__call__"),
    ACTIVATION: ("mlp.gate_up.ops", "silu_and_mul"),
    "mlp_up_proj": ("mlp.gate_up", "gated"),
    "mlp_down_proj": ("mlp.down", "add_to"),
}
WHOLE_OPERATIONS = {
    "embed_linear": ("embedding", "__call__"),
    "norm": ("norm", "__call__"),
    "lm_head_linear": ("head", "__call__"),
}


class Mark(NamedTuple):
    """One call: host time at its start in seconds, and its own duration, without the hooked calls within it."""

    name: str
    start_s: float
    duration_s: Callable[[], float]


class _Span(NamedTuple):
    """A part of a call in which no hooked call runs. duration_s: on the device, once it is synchronized."""

    start_s: float
    host_s: float
    duration_s: Callable[[], float]


class OperationProbe:
    """Collects marks of one step. Create it before the first step."""

    def __init__(self, model: Decoder) -> None:
        self._marks: list[Mark] = []
        self._running: list[list[_Span]] = []  # spans so far of each hooked call that is running, the innermost last
        self._stop: Callable[[], _Span]
        self._on_cuda = model.place.device.type == "cuda"
        self._hook_parts(model.layers[len(model.layers) // 2], LAYER_OPERATIONS)
        self._hook_parts(model, WHOLE_OPERATIONS)

    def take(self) -> list[Mark]:
        """Marks since the last call, in order; waits for the device."""
        marks, self._marks = self._marks, []
        if marks and self._on_cuda:
            torch.cuda.synchronize()
        return sorted(marks, key=lambda mark: mark.start_s)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, leaving a mark each time."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self._pause()
            self._running.append([])
            self._resume()
            result = call(*args, **kwargs)
            self._pause()
            spans = self._running.pop()
            main = max(spans, key=lambda span: span.host_s)
            self._marks.append(Mark(name, main.start_s, lambda: sum(span.duration_s() for span in spans)))
            self._resume()
            return result

        return measured

    def _pause(self) -> None:
        if self._running:
            self._running[-1].append(self._stop())

    def _resume(self) -> None:
        if self._running:
            self._stop = _start_event_span() if self._on_cuda else _start_host_span()

    def _hook_parts(self, whole: Any, operations: Mapping[str, tuple[str, str]]) -> None:
        """Replace the parts by copies with timed methods: other layers share the backend and the operations."""
        copies: dict[str, Any] = {}
        for name, (path, method) in operations.items():
            *parents, leaf = path.split(".")
            owner = reduce(getattr, parents, whole)
            if not hasattr(getattr(owner, leaf), method):
                continue  # not a call of its own on this device
            if path not in copies:
                copies[path] = copy.copy(getattr(owner, leaf))
                setattr(owner, leaf, copies[path])
            part, call = copies[path], self.timed(name, getattr(copies[path], method))
            if method == "__call__":
                setattr(owner, leaf, _Callable(part, call))
            else:
                setattr(part, method, call)


class _Callable:
    """A part whose own call is replaced."""

    def __init__(self, part: Any, call: Callable[..., Any]) -> None:
        self._part, self._call = part, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _start_host_span() -> Callable[[], _Span]:
    start_s, began_s = time.monotonic(), time.perf_counter()

    def stop() -> _Span:
        duration_s = time.perf_counter() - began_s
        return _Span(start_s, duration_s, lambda: duration_s)

    return stop


def _start_event_span() -> Callable[[], _Span]:
    event: Any = torch.cuda.Event
    first, last = event(enable_timing=True), event(enable_timing=True)
    start_s = time.monotonic()
    first.record()

    def stop() -> _Span:
        last.record()
        return _Span(start_s, time.monotonic() - start_s, lambda: float(first.elapsed_time(last)) / 1e3)

    return stop


class ProbedExecutor(Executor):
    """An executor whose steps tell the store of their operations. attn is told apart by what the batch holds."""

    def __init__(self, executor: Executor, probe: OperationProbe, store: MetricsStore) -> None:
        self._executor, self._probe, self._store = executor, probe, store
        self.vocab_size, self.max_model_len = executor.vocab_size, executor.max_model_len
        self.capacity = executor.capacity
        self.token_bytes, self.resolution = executor.token_bytes, executor.resolution
        self.max_in_flight, self.takes_functions = 1, executor.takes_functions

    def launch(self, out: SchedulerOutput) -> CompletedStep:
        """One step to its end, so that its operations are its own."""
        result = self._executor.launch(out).result()
        attention = attention_name(out.chunks)
        for mark in self._probe.take():
            name = attention if mark.name == ATTENTION else mark.name
            self._store.on_operation(name, mark.start_s, mark.duration_s(), on_device=True)
        return CompletedStep(result)

    def wait(self) -> None:
        self._executor.wait()

    def memory_stats(self) -> MemoryStats:
        return self._executor.memory_stats()

    def resize_cache(self, rows: int) -> bool:
        return self._executor.resize_cache(rows)

    def drop_weights(self) -> None:
        self._executor.drop_weights()

    def load_weights(self) -> None:
        self._executor.load_weights()

    def check_integrity(self) -> None:
        self._executor.check_integrity()

    def shutdown(self) -> None:
        self._executor.shutdown()


def attention_name(chunks: Sequence[Chunk]) -> str:
    """attn_prefill or attn_decode where the batch is all of a kind, attn where it is mixed."""
    single = {chunk.num_tokens == 1 for chunk in chunks}
    if len(single) > 1:
        return ATTENTION
    return "attn_decode" if True in single else "attn_prefill"
