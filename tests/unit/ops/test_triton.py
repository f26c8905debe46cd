"""The Triton operations in Triton's interpreter against the torch ones, over random shapes."""

import importlib.util
import inspect
import os
import random
import sys

import numpy
import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the compiled kernels here", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported before it could be told to interpret", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before the imports below

from sarathi.messages import PrefixGroup
from sarathi.model_executor.attention import cascade
from sarathi.model_executor.attention.cascade import as_cascade, plan_cascade
from sarathi.model_executor.ops import Ops, native
from sarathi.model_executor.ops.native import NativeOps
from sarathi.model_executor.ops.triton import elementwise, rope, sampling
from sarathi.model_executor.ops.triton.attention.cascade import CascadeConfig, CascadeWorkspace
from sarathi.model_executor.ops.triton.attention.decode import (
    DecodeConfig,
    DecodeWorkspace,
    decode_attention,
    distinct_sizes,
)
from sarathi.model_executor.ops.triton.linear import LinearKernels
from sarathi.model_executor.ops.triton.matvec import Epilogue, MatvecConfig, matvec
from sarathi.model_executor.ops.triton.ops import TritonOps
from sarathi.model_executor.ops.triton.skinny import MAX_TILES, SkinnyConfig, skinny
from sarathi.model_executor.ops.types import CacheTarget, DecodeBatch, NewTokens, RopeTable, placeholder_token

NATIVE = NativeOps()
CPU = torch.device("cpu")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
# The interpreter turns loop bounds into integers in a way that numpy 2.4 no longer takes.
loops = pytest.mark.skipif(
    numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton's interpreter needs numpy < 2.4 for loops"
)


@pytest.fixture(autouse=True, params=range(2))
def seed(request: pytest.FixtureRequest) -> int:
    value = random.randrange(2**31)
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


def test_interfaces_are_the_same() -> None:
    names = [name for name in vars(Ops) if not name.startswith("_")]
    assert {"linear", "embed", "draw"} < set(names)
    for name in names:
        expected, *found = (_parameters(getattr(each, name)) for each in (Ops, NativeOps, TritonOps))
        assert found == [expected, expected], name


def _parameters(call: object) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in inspect.signature(call).parameters.values() if p.name != "self"]


def test_rms_norm() -> None:
    size = random.choice((48, 128, 320))
    x, weight = torch.randn(5, size), torch.randn(size)
    torch.testing.assert_close(elementwise.rms_norm(x, weight, 1e-5), NATIVE.rms_norm(x, weight, 1e-5), **CLOSE)


def test_rms_norm_of_heads_within_a_wider_tensor() -> None:
    packed, weight = torch.randn(4, 7 * 32), torch.randn(32)
    heads = packed[:, 32 : 32 * 5].unflatten(1, (4, 32))
    torch.testing.assert_close(elementwise.rms_norm(heads, weight, 1e-6), NATIVE.rms_norm(heads, weight, 1e-6), **CLOSE)


def test_silu_and_mul() -> None:
    gate_up = torch.randn(random.randint(1, 5), 2 * random.choice((24, 2048, 2500)))
    torch.testing.assert_close(elementwise.silu_and_mul(gate_up), NATIVE.silu_and_mul(gate_up), **CLOSE)


def test_rope_and_store_into_a_strided_cache() -> None:
    q_heads, kv_heads, half = random.choice(((9, 3, 16), (16, 8, 12), (4, 1, 16)))
    tokens, table = random.randint(1, 6), RopeTable(torch.randn(50, half), torch.randn(50, half))
    packed = torch.randn(tokens, (q_heads + 2 * kv_heads) * 32)
    places = torch.randperm(3 * 10)[:tokens].int()
    rows, positions = places // 10, torch.randint(0, 50, (tokens,))
    rows[random.randrange(tokens)] = -1
    results = []
    for kernels in (rope, NATIVE):
        heads = packed.clone().unflatten(1, (-1, 32))
        cache = torch.full((3, 10, 5, kv_heads, 32), 7.0)  # five layers side by side, as in a megacache
        target = CacheTarget(cache[:, :, 1], cache[:, :, 4], rows, places % 10)
        kernels.rope_and_store(*heads.split((q_heads, kv_heads, kv_heads), dim=1), positions, table, target)
        results.append((heads, cache))
    torch.testing.assert_close(results[0], results[1], **CLOSE)


def test_argmax_is_the_native_one() -> None:
    logits = torch.randn(4, random.choice((100, 4096, 9000))) * 3
    logits[:, ::7] = float("-inf")
    assert sampling.argmax(logits).tolist() == NATIVE.argmax(logits).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_argmax_of_logits_that_are_not_finite_is_the_native_one(dtype: torch.dtype) -> None:
    vocab_size = random.choice((100, 4096, 9000))
    logits, slots = torch.randn(8, vocab_size).to(dtype), torch.randperm(9)[:8].int()
    at = random.randrange(vocab_size)
    logits[0, at], logits[1, at], logits[2], logits[3, ::3] = float("nan"), float("inf"), float("-inf"), float("-inf")
    logits[4, [0, -1]] = torch.tensor([float("inf"), float("nan")], dtype=dtype)
    logits[5, [0, -1]] = torch.tensor([float("nan"), float("-inf")], dtype=dtype)
    last_tokens, expected = torch.full((9,), 77), torch.full((9,), 77)
    tokens = sampling.argmax_into(logits, slots, last_tokens)
    assert tokens.tolist() == NATIVE.argmax_into(logits, slots, expected).tolist() == sampling.argmax(logits).tolist()
    assert [index for index, token in enumerate(tokens.tolist()) if token == -1] == [0, 1, 2, 4, 5]
    assert last_tokens.tolist() == expected.tolist() and min(last_tokens.tolist()) >= 0


def test_masks_of_some_rows_are_the_native_ones() -> None:
    rows, vocab = random.randint(1, 6), random.choice((31, 32, 4096, 9001))
    logits = torch.randn(rows, vocab)
    chosen = torch.randperm(rows)[: random.randint(0, rows)]
    bits = torch.randint(-(2**31), 2**31, (len(chosen), -(-vocab // 32)), dtype=torch.int32)
    found, expected = logits.clone(), logits.clone()
    sampling.mask_tokens(found, chosen, bits)
    for row, words in zip(chosen.tolist(), bits.tolist(), strict=True):
        barred = [token for token in range(vocab) if not words[token // 32] >> token % 32 & 1]
        expected[row, barred] = float("-inf")
    assert torch.equal(found, expected)
    NATIVE.mask_tokens(logits, chosen, bits)
    assert torch.equal(logits, expected)


def test_argmax_takes_the_first_of_equals() -> None:
    logits = torch.zeros(2, 9000)
    logits[0, [8500, 300, 4100]] = 5.0
    assert sampling.argmax(logits).tolist() == [300, 0]


def test_argmax_is_written_to_its_slot() -> None:
    logits, slots = torch.randn(5, 9000), torch.randperm(12)[:5].int()
    last_tokens, expected = torch.full((12,), 77), torch.full((12,), 77)
    tokens = sampling.argmax_into(logits, slots, last_tokens)
    assert tokens.tolist() == NATIVE.argmax_into(logits, slots, expected).tolist() == logits.argmax(1).tolist()
    assert last_tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embed_resolves_placeholder_tokens(dtype: torch.dtype) -> None:
    weight, last_tokens = torch.randn(30, random.choice((48, 64))), torch.randint(0, 30, (9,))
    token_ids, slots = torch.randint(0, 30, (12,)), torch.randint(0, 9, (12,))
    late = torch.rand(12) < 0.5
    given = torch.where(late, torch.tensor([placeholder_token(slot) for slot in slots.tolist()]), token_ids).to(dtype)
    expected = weight[torch.where(late, last_tokens[slots], token_ids)]
    for ops in (elementwise, NATIVE):
        assert torch.equal(ops.embed(given, weight, last_tokens), expected)
        assert torch.equal(ops.embed(token_ids.to(dtype), weight), weight[token_ids])


@loops
def test_draws_are_the_native_ones() -> None:
    logits = torch.randn(40, random.choice((50, 8192, 9000, 20000))) * 3
    logits[torch.rand(logits.shape) < 0.9] = float("-inf")
    logits[:, 17] = 0.0
    logits[0, 18:] = float("-inf")
    uniform = torch.rand(40, 1, dtype=torch.float64)
    uniform[1], uniform[2], uniform[3] = 0.0, 1.0 - 2.0**-53, 1.0 - 2.0**-53
    found, expected = sampling.draw(logits, uniform), NATIVE.draw(logits, uniform)
    assert (found != expected).sum() <= 2, (found, expected)  # a number may fall on the border of two tokens
    assert logits.gather(1, found[:, None]).isfinite().all()


@loops
def test_draws_from_logits_that_are_no_numbers_are_tokens() -> None:
    found = sampling.draw(torch.full((2, 9000), float("nan")), torch.full((2, 1), 0.5, dtype=torch.float64))
    assert ((found >= 0) & (found < 9000)).all()


@loops
def test_top_p_threshold() -> None:
    """Over several blocks and less than one; of bf16, where many logits are equal; with most tokens cut before."""
    vocab_size = random.choice((50, 8192, 9000, 20000))
    logits = torch.randn(9, vocab_size) * torch.tensor([0.01, 1.0, 1.0, 5.0, 3.0, 2.0, 1.0, 1.0, 1.0])[:, None]
    logits[2] = logits[2].bfloat16()
    logits[4] -= 40.0
    logits[5, 3:] = float("-inf")
    logits[6, :9] = 20.0  # equal, and together all that counts
    top_p = torch.tensor([0.9, 0.5, 0.95, 0.999, 1e-6, 0.7, 0.3, 1e-40, 1e-50])[:, None]  # float32 has no 1e-50
    top_p[random.randrange(7)] = 1.0
    thresholds = sampling.top_p_threshold(logits, top_p)
    _assert_nucleus(logits, top_p, thresholds)
    _assert_nucleus(logits, top_p, NATIVE.top_p_threshold(logits, top_p))


def _assert_nucleus(logits: Tensor, top_p: Tensor, thresholds: Tensor) -> None:
    """By definition: from the threshold on they reach top_p, above it they do not. Sums of float32 are rounded."""
    cut = (top_p < 1.0)[:, 0]
    assert (thresholds[~cut] == float("-inf")).all()
    probabilities, limits = logits[cut].double().softmax(-1), thresholds[cut]
    assert (logits[cut] == limits).any(1).all()
    assert (torch.where(logits[cut] >= limits, probabilities, 0.0).sum(1) > top_p[cut, 0] - 1e-5).all()
    assert (torch.where(logits[cut] > limits, probabilities, 0.0).sum(1) < top_p[cut, 0] + 1e-5).all()


@loops
def test_top_p_threshold_ends_whatever_the_logits() -> None:
    logits = torch.randn(4, 100)
    logits[0], logits[1], logits[2, 50], logits[3, 7] = float("nan"), float("-inf"), float("nan"), float("inf")
    assert sampling.top_p_threshold(logits, torch.full((4, 1), 0.9)).shape == (4, 1)


def test_products_go_where_they_are_told() -> None:
    x, weight = torch.randn(1, 128), torch.randn(24, 128)
    for kernels in (LinearKernels(2, CPU), LinearKernels(2, CPU, max_skinny_tokens=0), NATIVE):
        out = torch.empty(3, 24)[1:2]
        assert kernels.linear(x, weight, out=out) is out
        assert_near(out, x @ weight.t())


def test_matvec_with_every_epilogue() -> None:
    outputs, size = random.choice(((37, 320), (64, 384)))
    x, weight, gated_weight = torch.randn(1, size), torch.randn(outputs, size), torch.randn(2 * outputs, size)
    bias, residual = torch.randn(outputs), torch.randn(1, outputs)
    config, out = MatvecConfig(random.choice((1, 2, 4)), 128, 4), torch.empty(1, outputs)
    matvec(x, weight, out, Epilogue(bias=bias), config)
    assert_near(out, NATIVE.linear(x, weight, bias))
    matvec(x, gated_weight, out, Epilogue(gated=True), config)
    assert_near(out, NATIVE.gated_linear(x, gated_weight))
    for added in (None, bias):
        expected = residual.clone()
        NATIVE.linear_add(x, weight, expected, added)
        matvec(x, weight, residual, Epilogue(bias=added, residual=residual), config)
        assert_near(residual, expected)


@loops
@pytest.mark.parametrize("splits", [1, 3])
def test_skinny_with_every_epilogue(splits: int) -> None:
    tokens, outputs, size = random.randint(1, 16), random.choice((37, 128)), 256
    x, weight, gated_weight = torch.randn(tokens, size), torch.randn(outputs, size), torch.randn(2 * outputs, size)
    bias, residual, out = torch.randn(outputs), torch.randn(tokens, outputs), torch.empty(tokens, outputs)
    config, counters = SkinnyConfig(32, 64, splits), torch.zeros(MAX_TILES, dtype=torch.int32)
    skinny(x, weight, out, Epilogue(bias=bias), config, counters)
    assert_near(out, NATIVE.linear(x, weight, bias))
    skinny(x, gated_weight, out, Epilogue(gated=True), config, counters)
    assert_near(out, NATIVE.gated_linear(x, gated_weight))
    for added in (None, bias):
        expected = residual.clone()
        NATIVE.linear_add(x, weight, expected, added)
        skinny(x, weight, residual, Epilogue(bias=added, residual=residual), config, counters)
        assert_near(residual, expected)
    assert not counters.any()


@loops
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_linear_kernels_choose_by_shape(tokens: int, biased: bool) -> None:
    ours = LinearKernels(2, CPU)
    x, weight = torch.randn(tokens, 256).half(), torch.randn(160, 256).half() / 16
    residual = torch.randn(tokens, 160).half()
    bias = torch.randn(160).half() if biased else None
    close = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(ours.linear(x, weight, bias), NATIVE.linear(x, weight, bias), **close)
    torch.testing.assert_close(ours.gated_linear(x, weight, bias), NATIVE.gated_linear(x, weight, bias), **close)
    expected = residual.clone()
    ours.linear_add(x, weight, residual, bias)
    NATIVE.linear_add(x, weight, expected, bias)
    torch.testing.assert_close(residual, expected, **close)


@loops
@pytest.mark.parametrize("window", [None, 20])
def test_decode_attention(window: int | None) -> None:
    num_seqs, kv_heads, group = random.randint(1, 5), random.choice((1, 2, 3)), random.choice((1, 3, 4, 8))
    cache = torch.full((num_seqs + 2, 150, 4, kv_heads, 32), float("nan"))
    slots = torch.randperm(num_seqs + 2)[:num_seqs].int()
    lengths = torch.tensor([random.choice((0, 1, 15, 16, 17, 150, random.randint(1, 150))) for _ in slots]).int()
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        cache[slot, :length] = torch.randn(length, 4, kv_heads, 32)
    keys, values = cache[:, :, 1], cache[:, :, 2]
    q = torch.randn(num_seqs, kv_heads * group + 2, 32)[:, :-2]
    batch = DecodeBatch(slots, lengths, window)
    workspace = DecodeWorkspace.create(
        random.choice((1, 4, 9)), 32, CPU, DecodeConfig(16, run_cost=random.randrange(4), parts=random.randint(1, 9))
    )
    expected = native.decode_attention(q, keys, values, batch, 0.2)
    torch.testing.assert_close(decode_attention(q, keys, values, batch, 0.2, workspace), expected, **CLOSE)
    assert not workspace.arrivals.any()


@loops
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 4), (1, 8), (3, 1), (1, 3)])
def test_cascade_attention_is_decode_attention(kv_heads: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups, of which one may need several tiles of queries, loners and padding; against float64."""
    dtype = random.choice((torch.float32, torch.float16))  # the interpreter has no products of bfloat16
    monkeypatch.setattr(cascade, "_LEAST_TILES", 1)
    numbers = random.sample(range(8), 8)
    groups = [
        PrefixGroup(random.randint(1, 90), tuple(numbers[:4])),
        PrefixGroup(random.choice((16, 33)), tuple(numbers[4:6])),
    ]
    lengths = [random.randint(1, 70) for _ in numbers]
    lengths[numbers[7]] = 0
    for each in groups:
        for member in each.members:
            lengths[member] += each.num_tokens
    cache = torch.full((2, 9, 160, kv_heads, 16), float("nan"), dtype=dtype)
    slots = random.sample(range(9), 8)
    for slot, length in zip(slots, lengths, strict=True):
        cache[:, slot, :length].normal_()
    for each in groups:
        for member in each.members:
            cache[:, slots[member], : each.num_tokens] = cache[:, slots[each.members[0]], : each.num_tokens]
    packed = torch.randn(8, kv_heads * (group + 2), 16, dtype=dtype)
    q, key, value = packed.split((kv_heads * group, kv_heads, kv_heads), dim=1)
    angles = torch.rand(160, 8) * 7
    new = random.choice((None, NewTokens(key, value, RopeTable(angles.cos(), angles.sin()))))
    config = CascadeConfig(rows=16, tile=16, fewest_ranges=random.randint(4, 12))
    room = CascadeWorkspace.create(2, (kv_heads * group, kv_heads, 16), CPU, config)
    workspace = DecodeWorkspace.create(
        random.choice((1, 4, 9)), 16, CPU, DecodeConfig(16, run_cost=random.randrange(4), parts=random.randint(1, 9))
    )._replace(cascade=room)
    plan = as_cascade(torch.tensor(plan_cascade(groups, slots, 8, room.shape), dtype=torch.int32), 8, room.shape)
    batch = DecodeBatch(torch.tensor(slots).int(), torch.tensor(lengths).int(), cascade=plan)
    exact, doubled = cache.double(), None if new is None else NewTokens(key.double(), value.double(), new.table)
    expected = native.decode_attention(q.double(), *exact, batch, 0.2, doubled)
    close = CLOSE if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(decode_attention(q, *cache, batch, 0.2, workspace, new).double(), expected, **close)
    torch.testing.assert_close(cache.double(), exact, equal_nan=True, **close)
    assert not workspace.arrivals.any()


@pytest.mark.parametrize(
    ("fewest", "most", "sizes"),
    [(1, 600, [16, 64, 256, 600]), (128, 1024, [256, 1024]), (5, 5, [5]), (9, 3, [])],
)
def test_every_kernel_of_decode_attention_has_one_size(fewest: int, most: int, sizes: list[int]) -> None:
    assert distinct_sizes(fewest, most, 128) == sizes


@loops
def test_decode_attention_rotates_and_stores_the_new_tokens() -> None:
    num_seqs, kv_heads, group = random.randint(1, 5), random.choice((1, 2, 3)), random.choice((1, 3, 4, 8))
    cache = torch.randn(2, num_seqs, 90, kv_heads, 32)
    lengths = torch.tensor([random.choice((0, 1, 16, 17, 90)) for _ in range(num_seqs)]).int()
    batch = DecodeBatch(torch.randperm(num_seqs).int(), lengths)
    packed = torch.randn(num_seqs, kv_heads * (group + 2), 32)
    q, key, value = packed.split((kv_heads * group, kv_heads, kv_heads), dim=1)
    new = NewTokens(key, value, RopeTable(torch.randn(90, 16), torch.randn(90, 16)))
    workspace = DecodeWorkspace.create(
        random.choice((1, 4, 9)), 32, CPU, DecodeConfig(16, run_cost=random.randrange(4), parts=random.randint(1, 9))
    )
    expected_cache = cache.clone()
    expected = native.decode_attention(q, *expected_cache, batch, 0.2, new)
    torch.testing.assert_close(decode_attention(q, *cache, batch, 0.2, workspace, new), expected, **CLOSE)
    torch.testing.assert_close(cache, expected_cache, **CLOSE)


def assert_near(ours: Tensor, expected: Tensor) -> None:
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
