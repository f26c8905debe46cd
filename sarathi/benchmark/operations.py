"""Times of single operations: one layer of the decoder, and what stands before and after all layers. Knows no engine.

An operation is a callable held by the decoder's parts; the probe puts a timed one in its place, on one layer only, so
that the cost stays small. The fused decoder calls the same kernels in every layer: there the weight that a call is
given tells which operation it is. Names are those of Sarathi-Serve's metrics store; README.md tells which of them hold
others, and which are absent. Multiply a layer's by the number of layers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from sarathi.executor.base import Executor
from sarathi.messages import Chunk, CompletedStep, MemoryStats, SchedulerOutput
from sarathi.metrics import MetricsStore
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.models.fused import FusedDecoder
from sarathi.model_executor.ops import Ops

ATTENTION, BEFORE_ATTENTION = "attn", "attn_pre_proj"
ROTATION, SAVE = "attn_rope", "attn_kv_cache_save"
LAYER_OPERATIONS = {  # name: (path from the layer to the object, method; "" where the object itself is called)
    "input_layernorm": ("input_norm", "add"),
    BEFORE_ATTENTION: ("attention.qkv", ""),
    ROTATION: ("attention.rotate", ""),
    ATTENTION: ("attention.backend", "forward"),
    "attn_post_proj": ("attention.output", ""),
    "post_attention_layernorm": ("post_norm", "add"),
    "mlp_up_proj": ("feed_forward.gate_up", ""),
    "mlp_activation": ("feed_forward.activate", ""),
    "mlp_down_proj": ("feed_forward.down", ""),
}
EMBEDDING = "embed_linear"
WHOLE_OPERATIONS = {EMBEDDING: ("embedding", ""), "norm": ("norm", "add"), "lm_head_linear": ("head", "")}
Timer = Callable[[str, Callable[..., Any]], Callable[..., Any]]


class _Mark(NamedTuple):
    """One call: host seconds at its start, and what its end less its beginning is on the device."""

    name: str
    start_s: float
    duration_s: Callable[[], float]


class OperationProbe:
    """Collects marks of one step; made before the first step."""

    def __init__(self, model: Decoder | FusedDecoder) -> None:
        self._marks: list[_Mark] = []
        decoder = model.decoder if isinstance(model, FusedDecoder) else model
        self._on_cuda = decoder.embedding.weight.is_cuda
        self._begin()
        if isinstance(model, FusedDecoder):
            self._attach_fused(model)
        else:
            self._attach(decoder)

    def take(self) -> list[_Mark]:
        """Marks since the last call; the device is waited for."""
        marks, self._marks = self._marks, []
        if marks and self._on_cuda:
            torch.cuda.synchronize()
        return marks

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with a mark for each time. Where it begins with another timed call, its own time starts behind it."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            result = call(*args, **kwargs)
            start_s, stop = self._begun
            self._marks.append(_Mark(name, start_s, stop()))
            self._begin()
            return result

        return measured

    def _begin(self) -> None:
        self._begun = time.monotonic(), self._clock()

    def _clock(self) -> Callable[[], Callable[[], float]]:
        """Starts; the result stops, and gives a function that reads the seconds between once they are known."""
        if not self._on_cuda:
            start_s = time.perf_counter()
            return lambda: _constant(time.perf_counter() - start_s)
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()

        def stop() -> Callable[[], float]:
            last.record()
            return lambda: float(first.elapsed_time(last)) / 1e3

        return stop

    def _attach(self, decoder: Decoder) -> None:
        for name, owner, leaf, method in _parts(decoder):
            part = getattr(owner, leaf)
            if name == ATTENTION:
                part = _with_timed(part, "store", self.timed, SAVE)
            call = getattr(part, method) if method else part
            setattr(owner, leaf, _Stand(part, self.timed(name, call), method))

    def _attach_fused(self, model: FusedDecoder) -> None:
        parts = {name: getattr(owner, leaf) for name, owner, leaf, _ in _parts(model.decoder)}
        weights = {name: part.weight for name, part in parts.items() if name != EMBEDDING and hasattr(part, "weight")}
        kernels = _NamedKernels(model.kernels, weights, self.timed)
        timed = partial(kernels.after, BEFORE_ATTENTION)
        part = _with_timed(model.backend, "rope_and_store", timed, ROTATION)
        backend = _Stand(part, timed(ATTENTION, part.append_and_attend), "append_and_attend")
        for name, stand in (("kernels", kernels), ("backend", backend)):
            setattr(model, name, stand)


def _parts(decoder: Decoder) -> Iterator[tuple[str, Any, str, str]]:
    """Name, the object that holds the part, under which attribute, and the method that is called."""
    layer = decoder.layers[len(decoder.layers) // 2]
    for whole, operations in ((layer, LAYER_OPERATIONS), (decoder, WHOLE_OPERATIONS)):
        for name, (path, method) in operations.items():
            owner: Any = whole
            *parents, leaf = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            yield name, owner, leaf, method


def _with_timed(part: Any, method: str, timed: Timer, name: str) -> Any:
    """A copy of the part that times its calls of a method of its own, where it has one: all layers share the part."""
    held = copy.copy(part)
    if hasattr(held, method):
        setattr(held, method, timed(name, getattr(held, method)))
    return held


class _NamedKernels:
    """In place of the kernels: a call that is given a weight with a name is timed under it."""

    def __init__(self, kernels: Ops, weights: Mapping[str, torch.Tensor], timed: Timer) -> None:
        self._kernels, self._weights, self._timed = kernels, weights, timed
        self._last = ""  # name of the newest call that had one

    def after(self, before: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed as `name` where the newest named call was `before`: the layer that is looked at has begun."""
        measured = self._timed(name, call)
        return lambda *args, **kwargs: (measured if self._last == before else call)(*args, **kwargs)

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._kernels, method)
        if method == "embed":  # not by its weight, which may be the head's too
            return self._timed(EMBEDDING, call)

        def named(*args: Any, **kwargs: Any) -> Any:
            name = self._name_of((*args, *kwargs.values()))
            if name is None:
                return call(*args, **kwargs)
            self._last = name
            return self._timed(name, call)(*args, **kwargs)

        return named

    def _name_of(self, values: Sequence[Any]) -> str | None:
        return next((name for name, weight in self._weights.items() if any(each is weight for each in values)), None)


class _Stand:
    """In place of a part: the timed call instead of its own, everything else as it was."""

    def __init__(self, part: Any, call: Callable[..., Any], method: str) -> None:
        self._part, self._call = part, call
        if method:
            setattr(self, method, call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class ProbedExecutor(Executor):
    """An executor whose steps tell the store of their operations. attn is told apart by what the batch holds."""

    def __init__(self, executor: Executor, probe: OperationProbe, store: MetricsStore) -> None:
        self._executor, self._probe, self._store = executor, probe, store
        self.vocab_size, self.max_model_len = executor.vocab_size, executor.max_model_len
        self.capacity = executor.capacity
        self.token_bytes, self.dtype_eps = executor.token_bytes, executor.dtype_eps
        self.max_in_flight = 1

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


def _constant(value: float) -> Callable[[], float]:
    return lambda: value
