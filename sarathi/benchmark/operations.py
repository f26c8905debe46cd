"""Times of single operations: one layer of the decoder, and what stands before and after all layers. Knows no engine.

An operation is a callable held by the decoder's parts; the probe puts a timed one in its place, on one layer only, so
that the cost stays small. Names are those of Sarathi-Serve's metrics store; multiply a layer's by the number of layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from sarathi.engine.llm_engine import Executor, Finished
from sarathi.messages import Chunk, MemoryStats, SchedulerOutput
from sarathi.metrics import MetricsStore
from sarathi.model_executor.models.decoder import Decoder

ATTENTION = "attn"
LAYER_OPERATIONS = {  # name: (path from the layer to the object, method; "" where the object itself is called)
    "input_layernorm": ("input_norm", "add"),
    "attn_pre_proj": ("attention.qkv", ""),
    ATTENTION: ("attention.backend", "forward"),
    "attn_post_proj": ("attention.output", ""),
    "post_attention_layernorm": ("post_norm", "add"),
    "mlp_up_proj": ("feed_forward.gate_up", ""),
    "mlp_down_proj": ("feed_forward.down", ""),
}
WHOLE_OPERATIONS = {"embed_linear": ("embedding", ""), "norm": ("norm", "add"), "lm_head_linear": ("head", "")}


class OperationsUnavailableError(ValueError):
    """The engine computes its layers in one piece, so that there is no single operation to time."""


class _Mark(NamedTuple):
    """One call: host seconds at its start, and what its end less its beginning is on the device."""

    name: str
    start_s: float
    duration_s: Callable[[], float]


class OperationProbe:
    """Collects marks of one step; made before the first step."""

    def __init__(self, decoder: Decoder) -> None:
        self._on_cuda = decoder.embedding.weight.is_cuda
        self._marks: list[_Mark] = []
        layer = decoder.layers[len(decoder.layers) // 2]
        for owner, operations in ((layer, LAYER_OPERATIONS), (decoder, WHOLE_OPERATIONS)):
            for name, (path, method) in operations.items():
                self._attach(owner, name, path, method)

    def take(self) -> list[_Mark]:
        """Marks since the last call; the device is waited for."""
        marks, self._marks = self._marks, []
        if marks and self._on_cuda:
            torch.cuda.synchronize()
        return marks

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with a mark for each time."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            start_s, ends = time.monotonic(), self._clock()
            result = call(*args, **kwargs)
            self._marks.append(_Mark(name, start_s, ends()))
            return result

        return measured

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

    def _attach(self, owner: Any, name: str, path: str, method: str) -> None:
        *parents, leaf = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        part = getattr(owner, leaf)
        call = getattr(part, method) if method else part
        setattr(owner, leaf, _Stand(part, self.timed(name, call), method))


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


class ProbedExecutor:
    """An executor whose steps tell the store of their operations. attn is told apart by what the batch holds."""

    def __init__(self, executor: Executor, probe: OperationProbe, store: MetricsStore) -> None:
        self._executor, self._probe, self._store = executor, probe, store
        self.vocab_size, self.capacity, self.token_bytes = executor.vocab_size, executor.capacity, executor.token_bytes
        self.max_in_flight = 1

    def launch(self, out: SchedulerOutput) -> Finished:
        """One step to its end, so that its operations are its own. OperationsUnavailableError where none was seen."""
        result = self._executor.launch(out).result()
        marks = self._probe.take()
        if out.chunks and result.available_rows is None and not marks:
            raise OperationsUnavailableError(
                "enable_op_level_metrics is true, but this engine computes its layers in one piece (a graph or a fused "
                "step); use enable_profiling, whose trace shows each kernel"
            )
        attention = attention_name(out.chunks)
        for mark in marks:
            name = attention if mark.name == ATTENTION else mark.name
            self._store.on_operation(name, mark.start_s, mark.duration_s(), on_device=True)
        return Finished(result)

    def memory_stats(self) -> MemoryStats:
        return self._executor.memory_stats()

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
