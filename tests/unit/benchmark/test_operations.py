"""The probe on a decoder of sleeping parts: every operation is timed once a step, on one layer, and changes nothing."""

import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sarathi.benchmark.run import operations
from sarathi.benchmark.run.operations import (
    ACTIVATION,
    ATTENTION,
    LAYER_OPERATIONS,
    ROPE,
    SAVE,
    WHOLE_OPERATIONS,
    OperationProbe,
    ProbedExecutor,
    attention_name,
)
from sarathi.messages import CacheCapacity, Chunk, CompletedStep, MemoryStats, Resolution, SchedulerOutput, StepResult
from sarathi.metrics import MetricsStore
from sarathi.metrics.tables import operation_table
from sarathi.model_executor.architecture import ModelArchitecture, Rope
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.ops.native import NativeOps, apply_rope
from sarathi.model_executor.ops.types import CacheTarget
from sarathi.model_executor.placement import Placement

SLEEP_S = 0.002
TOKENS = 5


class Part:
    """Adds one, slowly."""

    weight = torch.zeros(1)

    def __call__(self, x: float) -> float:
        time.sleep(SLEEP_S)
        return x + 1

    add_to = silu_and_mul = store = __call__


class FakeBackend(Part):
    """Stores at the end of one method, which another one calls at its beginning."""

    def append_and_attend(self, x: float) -> float:
        return self(self.rope_and_store(x))

    def rope_and_store(self, x: float) -> float:
        return self.store(self(x))


class GateUp(Part):
    """Its activation is an operation of its own."""

    ops = Part()

    def gated(self, x: float) -> float:
        return self.ops.silu_and_mul(self(x))


class FakeDecoder:
    """Parts where the real decoder has them."""

    place = Placement(torch.float32, torch.device("cpu"))

    def __init__(self, num_layers: int = 3) -> None:
        self.embedding, self.norm, self.head = Part(), Part(), Part()
        backend = FakeBackend()
        self.layers = [
            SimpleNamespace(
                input_norm=Part(),
                post_norm=Part(),
                attention=SimpleNamespace(qkv=Part(), backend=backend, output=Part()),
                mlp=SimpleNamespace(gate_up=GateUp(), down=Part()),
            )
            for _ in range(num_layers)
        ]

    def __call__(self, x: float) -> float:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer.attention.backend.append_and_attend(layer.attention.qkv(layer.input_norm(x)))
            x = layer.post_norm(layer.attention.output.add_to(x))
            x = layer.mlp.down.add_to(layer.mlp.gate_up.gated(x))
        return self.head(self.norm(x))


class FakeExecutor:
    vocab_size, max_model_len, capacity, token_bytes = 10, 9, CacheCapacity(1, 1, 1), 1
    resolution = Resolution("sdpa_vattn", "cpu", "float32", 2.0**-23)
    takes_functions = True

    def __init__(self, decoder: FakeDecoder) -> None:
        self.decoder, self.value = decoder, 0.0

    def launch(self, out: SchedulerOutput) -> CompletedStep:
        self.value = self.decoder(0.0)
        return CompletedStep(StepResult(out.step_id))

    def wait(self) -> None:
        pass

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
    operations = store.records().operations
    names = {row.name for row in operations}
    assert names == {*LAYER_OPERATIONS, *WHOLE_OPERATIONS, "attn_prefill", "attn_decode"}
    assert len(operations) == 3 * len({*LAYER_OPERATIONS, *WHOLE_OPERATIONS})
    assert all(SLEEP_S <= row.duration_s < 1 for row in operations)
    spans = [(row.start_s, row.start_s + row.duration_s) for row in operations]
    assert all(end <= start + SLEEP_S / 2 for (_, end), (start, _) in pairwise(spans))  # none lies within another
    table = operation_table(store.records(), on_device=True)
    assert min(table.values("mlp_up_proj")) >= 1e3 * SLEEP_S


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of all tokens to all, [T, heads, head_size] each."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    weights = torch.einsum("qhd,khd->hqk", query, keys).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).contiguous()


class OneCallBackend(AttentionBackend):
    """Everything in one kernel, as in decode steps on a GPU. No cache."""

    def plan(self, batch, address):
        pass

    def attend(self, query, layer, metadata):
        raise AssertionError("append_and_attend does all of it")

    def append_and_attend(self, query, new, positions, layer, metadata):
        return attention(query, new.keys, new.values)


class StoringBackend(AttentionBackend):
    """Rotates and stores in one kernel and attends in another."""

    def plan(self, batch, address):
        pass

    def rope_and_store(self, query, new, positions, layer, metadata):
        target = CacheTarget(layer.k, layer.v, torch.zeros(TOKENS, dtype=torch.int32), torch.arange(TOKENS))
        NativeOps().rope_and_store(query, new.keys, new.values, positions, new.table, target)

    def attend(self, query, layer, metadata):
        return attention(query, layer.k[0, :TOKENS], layer.v[0, :TOKENS])


ARCH = ModelArchitecture(
    "tiny", num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_size=8, vocab_size=50,
    max_positions=16, rms_norm_eps=1e-5, rope=Rope(theta=1e4),
)  # fmt: skip


class SeparateStore(StoringBackend):
    """Stores by a method of its own, as on the CPU."""

    def rope_and_store(self, query, new, positions, layer, metadata):
        apply_rope(query, new.keys, positions, new.table)
        self.store(new.keys, new.values, layer, metadata)

    def store(self, key, value, layer, metadata):
        layer.k[0, :TOKENS], layer.v[0, :TOKENS] = key, value


class TorchCalls(TorchFunctionMode):
    """A clock that every call of torch moves on by one, and every look at it by a little."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self._now += 1
        return function(*args, **(kwargs or {}))

    def read(self) -> float:
        self._now += 1e-6
        return self._now


class FusedOps(NativeOps):
    """The activation is a part of the product, as on a GPU."""

    def gated_linear(self, x, weight, bias=None):
        return NativeOps().silu_and_mul(self.linear(x, weight, bias))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("backend", "attends"),
    [
        (OneCallBackend(), [ATTENTION]),
        (StoringBackend(), [ROPE, ATTENTION]),
        (SeparateStore(), [ROPE, SAVE, ATTENTION]),
    ],
)
@pytest.mark.parametrize(("ops", "activates"), [(NativeOps(), [ACTIVATION]), (FusedOps(), [])])
def test_operations_of_the_decoder_are_timed_where_they_are_calls_of_their_own(
    qk_norm: bool, backend, attends, ops, activates, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = replace(ARCH, qk_norm=qk_norm)
    decoder = Decoder(arch, Placement(torch.float32, torch.device("cpu")), ops, backend, max_positions=16)
    for _, parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    cache = [CacheLayer(*torch.zeros(2, 1, 16, arch.num_kv_heads, arch.head_size), None) for _ in range(3)]
    batch = Batch((), torch.arange(TOKENS), torch.arange(TOKENS), None)

    expected, probe = decoder(batch, cache, None), OperationProbe(decoder)
    with TorchCalls() as calls:  # as the clock: on a busy machine a call takes longer than those it makes, or shorter
        monkeypatch.setattr(operations, "time", SimpleNamespace(monotonic=calls.read, perf_counter=calls.read))
        torch.testing.assert_close(decoder(batch, cache, None), expected)
    names = [mark.name for mark in probe.take()]
    everywhere = LAYER_OPERATIONS.keys() - {ROPE, SAVE, ATTENTION, ACTIVATION}
    assert sorted(names) == sorted([*everywhere, *WHOLE_OPERATIONS, *attends, *activates])
    assert names[names.index("attn_pre_proj") + 1 : names.index("attn_post_proj")] == attends
    assert names[names.index("mlp_up_proj") + 1 : names.index("mlp_down_proj")] == activates
    assert probe.take() == []


def test_attributes_of_a_timed_part_stay_in_reach() -> None:
    decoder = FakeDecoder()
    OperationProbe(decoder)
    assert decoder.embedding.weight is Part.weight


def test_attention_is_named_by_the_batch() -> None:
    assert attention_name([chunk("a", 1)]) == "attn_decode"
    assert attention_name([chunk("a", 9)]) == "attn_prefill"
    assert attention_name([chunk("a", 9), chunk("b", 1)]) == "attn"
