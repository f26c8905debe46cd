"""The probe on a decoder of sleeping parts: every operation is timed once a step, on one layer, and changes nothing."""

import time
from types import SimpleNamespace

import pytest
import torch

from sarathi.benchmark.operations import (
    LAYER_OPERATIONS,
    WHOLE_OPERATIONS,
    OperationProbe,
    OperationsUnavailableError,
    ProbedExecutor,
    attention_name,
)
from sarathi.engine.llm_engine import Finished
from sarathi.messages import CacheCapacity, Chunk, MemoryStats, SchedulerOutput, StepResult
from sarathi.metrics import MetricsStore
from sarathi.metrics.tables import operation_table

SLEEP_S = 0.002


class Part:
    """Adds one, slowly; is called as itself or by a method."""

    weight = torch.zeros(1)

    def __call__(self, x: float) -> float:
        time.sleep(SLEEP_S)
        return x + 1

    add = forward = __call__


class FakeDecoder:
    """Parts where the real decoder has them."""

    def __init__(self, num_layers: int = 3) -> None:
        self.embedding, self.norm, self.head = Part(), Part(), Part()
        self.layers = [
            SimpleNamespace(
                input_norm=Part(),
                post_norm=Part(),
                attention=SimpleNamespace(qkv=Part(), backend=Part(), output=Part()),
                feed_forward=SimpleNamespace(gate_up=Part(), down=Part()),
            )
            for _ in range(num_layers)
        ]

    def __call__(self, x: float) -> float:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer.attention.qkv(layer.input_norm.add(x))
            x = layer.attention.output(layer.attention.backend.forward(x))
            x = layer.feed_forward.down(layer.feed_forward.gate_up(layer.post_norm.add(x)))
        return self.head(self.norm.add(x))


class FakeExecutor:
    vocab_size, capacity, token_bytes = 10, CacheCapacity(1, 1, 1), 1

    def __init__(self, decoder: FakeDecoder, calls_decoder: bool = True) -> None:
        self.decoder, self.calls_decoder, self.value = decoder, calls_decoder, 0.0

    def launch(self, out: SchedulerOutput) -> Finished:
        self.value = self.decoder(0.0) if self.calls_decoder else 0.0
        return Finished(StepResult(out.step_id))

    def memory_stats(self) -> MemoryStats:
        return MemoryStats()

    def shutdown(self) -> None:
        pass


def chunk(name: str, num_tokens: int) -> Chunk:
    return Chunk(name, 0, num_tokens, True, num_tokens)


def test_each_operation_is_timed_once_a_step() -> None:
    decoder = FakeDecoder()
    executor, store = FakeExecutor(decoder), MetricsStore()
    probed = ProbedExecutor(executor, OperationProbe(decoder), store)
    for step_id, chunks in enumerate(
        ((chunk("a", 1), chunk("b", 1)), (chunk("a", 5),), (chunk("a", 1), chunk("b", 3)))
    ):
        probed.launch(SchedulerOutput(step_id, chunks=chunks))
    assert executor.value == 3 * len(LAYER_OPERATIONS) + len(WHOLE_OPERATIONS)
    operations = store.rows().operations
    names = {row.name for row in operations}
    assert names == {*LAYER_OPERATIONS, *WHOLE_OPERATIONS, "attn_prefill", "attn_decode"}
    assert len(operations) == 3 * (len(LAYER_OPERATIONS) + len(WHOLE_OPERATIONS))
    assert all(SLEEP_S <= row.duration_s < 1 for row in operations)
    table = operation_table(store.rows(), on_device=True)
    assert min(table.values("mlp_up_proj")) >= 1e3 * SLEEP_S


def test_an_engine_that_hides_its_operations_is_refused() -> None:
    decoder = FakeDecoder()
    probed = ProbedExecutor(FakeExecutor(decoder, calls_decoder=False), OperationProbe(decoder), MetricsStore())
    probed.launch(SchedulerOutput(0))  # nothing to compute, nothing to see
    with pytest.raises(OperationsUnavailableError, match="enable_profiling"):
        probed.launch(SchedulerOutput(1, chunks=(chunk("a", 1),)))


def test_attributes_of_a_timed_part_stay_in_reach() -> None:
    decoder = FakeDecoder()
    OperationProbe(decoder)
    assert decoder.embedding.weight is Part.weight


def test_attention_is_named_by_the_batch() -> None:
    assert attention_name([chunk("a", 1)]) == "attn_decode"
    assert attention_name([chunk("a", 9)]) == "attn_prefill"
    assert attention_name([chunk("a", 9), chunk("b", 1)]) == "attn"
