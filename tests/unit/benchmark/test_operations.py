"""The probe on a decoder of sleeping parts: every operation is timed once a step, on one layer, and changes nothing."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sarathi.benchmark.operations import (
    LAYER_OPERATIONS,
    WHOLE_OPERATIONS,
    OperationProbe,
    ProbedExecutor,
    attention_name,
)
from sarathi.engine.llm_engine import Finished
from sarathi.messages import CacheCapacity, Chunk, MemoryStats, SchedulerOutput, StepResult
from sarathi.metrics import MetricsStore
from sarathi.metrics.tables import operation_table
from sarathi.model_executor.architecture import ModelArchitecture, Rope
from sarathi.model_executor.kernels import create_kernels
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.models.fused import FusedDecoder
from sarathi.model_executor.placement import Placement

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

    def __init__(self, decoder: FakeDecoder) -> None:
        self.decoder, self.value = decoder, 0.0

    def launch(self, out: SchedulerOutput) -> Finished:
        self.value = self.decoder(0.0)
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


class NaiveBackend:
    """Attention of a fused step over the tokens of one sequence, kept in a list. No cache."""

    def append_and_attend(self, query, new, positions, layer, metadata):
        groups = query.shape[1] // new.keys.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (new.keys, new.values))
        weights = torch.einsum("qhd,khd->hqk", query, keys).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).contiguous()


ARCH = ModelArchitecture(
    "tiny", num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_size=8, vocab_size=50,
    max_positions=16, rms_norm_eps=1e-5, rope=Rope(theta=1e4),
)  # fmt: skip


@pytest.mark.parametrize("qk_norm", [False, True])
def test_operations_of_the_fused_decoder_are_told_by_their_weights(qk_norm: bool) -> None:
    arch = replace(ARCH, qk_norm=qk_norm)
    decoder = Decoder(arch, Placement(torch.float32, torch.device("cpu")), backend=None)
    for _, parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    fused = FusedDecoder(decoder, arch, create_kernels(torch.device("cpu")), NaiveBackend(), max_positions=16)

    def logits() -> torch.Tensor:
        stream = fused.embed(torch.arange(5), torch.zeros(1, dtype=torch.int64))
        return fused.logits(fused(stream, torch.arange(5), [None] * 3, None))

    expected, probe = logits(), OperationProbe(fused)
    torch.testing.assert_close(logits(), expected)
    names = [mark.name for mark in probe.take()]
    assert sorted(names) == sorted({*LAYER_OPERATIONS, *WHOLE_OPERATIONS})
    assert names.index("attn_pre_proj") + 1 == names.index("attn") == names.index("attn_post_proj") - 1
    assert probe.take() == []


def test_attributes_of_a_timed_part_stay_in_reach() -> None:
    decoder = FakeDecoder()
    OperationProbe(decoder)
    assert decoder.embedding.weight is Part.weight


def test_attention_is_named_by_the_batch() -> None:
    assert attention_name([chunk("a", 1)]) == "attn_decode"
    assert attention_name([chunk("a", 9)]) == "attn_prefill"
    assert attention_name([chunk("a", 9), chunk("b", 1)]) == "attn"
