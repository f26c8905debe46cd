"""Every compiled kernel against the torch operation, over fresh random shapes, in bf16 and fp16."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from sarathi.messages import PrefixGroup
from sarathi.model_executor.attention.cascade import as_cascade, plan_cascade
from sarathi.model_executor.ops.native import NativeOps, apply_rope
from sarathi.model_executor.ops.native import decode_attention as native_decode_attention
from sarathi.model_executor.ops.triton.attention.cascade import CascadeConfig, CascadeWorkspace
from sarathi.model_executor.ops.triton.attention.decode import DecodeConfig, DecodeWorkspace, decode_attention
from sarathi.model_executor.ops.triton.ops import TritonOps
from sarathi.model_executor.ops.types import CacheTarget, Cascade, DecodeBatch, NewTokens, RopeTable

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
NUM_SMS = torch.cuda.get_device_properties(CUDA).multi_processor_count
NATIVE = NativeOps()
TOLERANCE = 1e-2


@pytest.fixture(params=[(seed, dtype) for dtype in (torch.bfloat16, torch.float16) for seed in range(2)], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    return request.param[1]


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def ops(request: pytest.FixtureRequest) -> TritonOps:
    return TritonOps(CUDA, pdl=request.param)


def assert_near(ours: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error < tolerance, error


def test_norms(ops: TritonOps, dtype: torch.dtype) -> None:
    tokens, size = random.choice((1, 7, 300)), random.choice((576, 4096, 5120))
    x, weight = torch.randn(tokens, size, dtype=dtype, device=CUDA), torch.rand(size, dtype=dtype, device=CUDA)
    assert_near(ops.rms_norm(x, weight, 1e-5), NATIVE.rms_norm(x, weight, 1e-5))


def test_norm_of_heads(ops: TritonOps, dtype: torch.dtype) -> None:
    packed, weight = torch.randn(9, 48, 128, dtype=dtype, device=CUDA), torch.rand(128, dtype=dtype, device=CUDA)
    heads = packed[:, 3:40]
    assert_near(ops.rms_norm(heads, weight, 1e-6), NATIVE.rms_norm(heads, weight, 1e-6))


def test_silu_and_mul(ops: TritonOps, dtype: torch.dtype) -> None:
    gate_up = torch.randn(random.randint(1, 300), 2 * random.choice((1536, 11008, 14336)), dtype=dtype, device=CUDA)
    assert_near(ops.silu_and_mul(gate_up), NATIVE.silu_and_mul(gate_up))


def test_rope_and_store_far_into_a_megacache(ops: TritonOps, dtype: torch.dtype) -> None:
    q_heads, kv_heads, head_size = random.choice(((32, 8, 128), (32, 4, 128), (9, 3, 64), (8, 8, 64)))
    tokens, columns, layers = random.randint(1, 40), 131072, 32
    # One slot of one region is 2**31 bytes and more: offsets that 32 bits cannot hold.
    region = torch.zeros(2, columns, layers, kv_heads, head_size, dtype=dtype, device=CUDA)
    keys, values = region[:, :, 3], region[:, :, layers - 1]
    cols = torch.randperm(columns, device=CUDA)[:tokens].int()
    rows = torch.randint(-1, 2, (tokens,), device=CUDA).int()
    table = RopeTable(*torch.randn(2, 100, head_size // 2, device=CUDA))
    positions = torch.randint(0, 100, (tokens,), device=CUDA)
    packed = torch.randn(tokens, q_heads + 2 * kv_heads, head_size, dtype=dtype, device=CUDA)
    expected = packed.clone()
    ops.rope_and_store(*packed.split((q_heads, kv_heads, kv_heads), 1), positions, table,
                         CacheTarget(keys, values, rows, cols))  # fmt: skip
    q, k, v = expected.split((q_heads, kv_heads, kv_heads), dim=1)
    apply_rope(q, k, positions, table)
    assert_near(packed, expected)
    kept = rows >= 0
    at = (rows[kept].long(), cols[kept].long())
    if kept.any():
        assert_near(keys[at], k[kept])
        assert torch.equal(values[at], v[kept])
    assert (region.flatten(2) != 0).any(-1).sum() == kept.sum()


def test_argmax(ops: TritonOps, dtype: torch.dtype) -> None:
    rows, vocab = random.choice((1, 5, 64)), random.choice((49152, 64000, 128256))
    logits = torch.randn(rows, vocab, device=CUDA).to(dtype).float() * 3
    chosen = logits.gather(1, ops.argmax(logits)[:, None])[:, 0]
    assert torch.equal(chosen, logits.amax(dim=1))


def test_argmax_of_logits_that_are_not_finite(ops: TritonOps, dtype: torch.dtype) -> None:
    """NaN, infinity and excluded rows give -1, and 0 for the next step; rows beside them are as ever."""
    vocab, num_slots = random.choice((49152, 128256)), 70
    logits = torch.randn(64, vocab, device=CUDA).to(dtype)
    at = random.randrange(vocab)
    logits[0, at], logits[1, at], logits[2], logits[3, ::3] = float("nan"), float("inf"), float("-inf"), float("-inf")
    slots = torch.randperm(num_slots, device=CUDA)[:64].int()
    last_tokens = torch.full((num_slots,), 7, device=CUDA)
    found = ops.argmax_into(logits, slots, last_tokens)
    assert torch.equal(found, ops.argmax(logits)) and torch.equal(found, NATIVE.argmax(logits))
    assert found[:3].tolist() == [-1] * 3 and found[3:].min() >= 0
    assert torch.equal(last_tokens[slots.long()], found.clamp(min=0))


def test_masks_of_some_rows(ops: TritonOps, dtype: torch.dtype) -> None:
    rows, vocab = random.choice((1, 5, 64)), random.choice((49152, 128256, 151936, 151665))
    logits = torch.randn(rows, vocab, device=CUDA)
    chosen = torch.randperm(rows, device=CUDA)[: random.randint(1, rows)]
    bits = torch.randint(-(2**31), 2**31, (len(chosen), -(-vocab // 32)), dtype=torch.int32, device=CUDA)
    expected = logits.clone()
    NATIVE.mask_tokens(expected, chosen, bits)
    ops.mask_tokens(logits, chosen, bits)
    assert torch.equal(logits, expected) and logits.isinf().any()


def test_draws(ops: TritonOps, dtype: torch.dtype) -> None:
    rows, vocab = random.choice((1, 5, 300)), random.choice((1000, 49152, 128256, 151936))
    logits = torch.randn(rows, vocab, device=CUDA).to(dtype).float() * random.choice((0.1, 3.0))
    logits[torch.rand(rows, vocab, device=CUDA) < 0.5] = float("-inf")
    uniform = torch.rand(rows, 1, dtype=torch.float64, device=CUDA)
    uniform[0] = 1.0 - 2.0**-53
    found = ops.draw(logits, uniform)[:, None]
    reached = logits.double().softmax(-1).cumsum(-1)
    before = torch.where(found > 0, reached.gather(1, (found - 1).clamp(min=0)), 0.0)
    assert ((before < uniform + 1e-5) & (uniform < reached.gather(1, found) + 1e-5)).all()
    assert logits.gather(1, found).isfinite().all()


@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_top_p_threshold(ops: TritonOps, dtype: torch.dtype, spread: float) -> None:
    """By definition: from the threshold on they reach top_p, above it they do not."""
    rows, vocab = random.choice((1, 5, 300)), random.choice((1000, 49152, 128256, 151936))
    logits = (torch.randn(rows, vocab, device=CUDA) * spread).to(random.choice((dtype, torch.float32))).float()
    logits[: rows // 2, vocab // 3 :] = float("-inf")
    top_p = torch.rand(rows, 1, device=CUDA).clamp_(min=1e-3)
    top_p[::4] = 1.0
    thresholds, probabilities = ops.top_p_threshold(logits, top_p), logits.double().softmax(-1)
    cut = top_p < 1.0
    assert torch.equal(thresholds == float("-inf"), ~cut)
    reached = torch.where(logits >= thresholds, probabilities, 0.0).sum(1, keepdim=True)
    before = torch.where(logits > thresholds, probabilities, 0.0).sum(1, keepdim=True)
    assert ((reached > top_p - 1e-5) & (before < top_p + 1e-5))[cut].all()


def test_top_p_threshold_ends_whatever_the_logits(ops: TritonOps) -> None:
    logits = torch.randn(4, 50000, device=CUDA)
    logits[0], logits[1], logits[2, 50], logits[3, 7] = float("nan"), float("-inf"), float("nan"), float("inf")
    ops.top_p_threshold(logits, torch.full((4, 1), 0.9, device=CUDA))
    torch.cuda.synchronize()


def test_embed_and_the_argmax_that_is_stored(ops: TritonOps, dtype: torch.dtype) -> None:
    tokens, size, num_slots = random.choice((1, 16, 2000)), random.choice((576, 4096, 7168)), 3000
    weight = torch.randn(500, size, dtype=dtype, device=CUDA)
    last_tokens = torch.randint(0, 500, (num_slots + 1,), device=CUDA)
    token_ids = torch.randint(-num_slots, 500, (tokens,), device=CUDA).int()
    assert torch.equal(ops.embed(token_ids, weight, last_tokens), NATIVE.embed(token_ids, weight, last_tokens))
    known = token_ids.clamp(min=0)
    assert torch.equal(ops.embed(known, weight), NATIVE.embed(known, weight))
    logits = torch.randn(tokens, 9000, device=CUDA).to(dtype)
    slots = torch.randperm(num_slots, device=CUDA)[:tokens].int()
    before = last_tokens.clone()
    found = ops.argmax_into(logits, slots, last_tokens)
    assert torch.equal(logits.gather(1, found[:, None])[:, 0], logits.amax(1))
    before[slots.long()] = found
    assert torch.equal(last_tokens, before)


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_products_go_where_they_are_told(ops: TritonOps, tokens: int) -> None:
    x, weight, *_ = _linear_inputs(tokens, 6144, 4096)
    buffer = torch.full((64, 6144), float("nan"), dtype=x.dtype, device=CUDA)
    assert ops.linear(x, weight, out=buffer[:tokens]).data_ptr() == buffer.data_ptr()
    assert_near(buffer[:tokens], NATIVE.linear(x, weight))
    assert buffer[tokens:].isnan().all()


@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (4096, 14336), (4096, 11008), (1000, 576)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 9, 16, 17])
def test_linear(shape: tuple[int, int], tokens: int, ops: TritonOps) -> None:
    x, weight, bias, residual = _linear_inputs(tokens, *shape)
    assert_near(ops.linear(x, weight, bias), NATIVE.linear(x, weight, bias))
    for added in (None, bias):
        expected = residual.clone()
        ops.linear_add(x, weight, residual, added)
        NATIVE.linear_add(x, weight, expected, added)
        assert_near(residual, expected)


@pytest.mark.parametrize("tokens", [1, 2, 9, 16, 17])
@pytest.mark.parametrize("inner", [1536, 11008, 14336])
def test_gated_linear(inner: int, tokens: int, ops: TritonOps) -> None:
    x, weight, bias, _ = _linear_inputs(tokens, 2 * inner, 4096)
    assert_near(ops.gated_linear(x, weight), NATIVE.gated_linear(x, weight))
    assert_near(ops.gated_linear(x, weight, bias), NATIVE.gated_linear(x, weight, bias))


def test_split_products_do_not_depend_on_timing(ops: TritonOps) -> None:
    x, weight, *_ = _linear_inputs(16, 4096, 4096)
    first = ops.linear(x, weight)
    assert all(torch.equal(ops.linear(x, weight), first) for _ in range(50))


def _linear_inputs(tokens: int, outputs: int, inputs: int) -> tuple[Tensor, ...]:
    shapes = ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
    return tuple(torch.randn(shape, dtype=torch.bfloat16, device=CUDA) for shape in shapes)


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("head_size", [64, 128])
def test_decode_attention(group: int, head_size: int) -> None:
    dtype = random.choice((torch.bfloat16, torch.float16))
    kv_heads, num_seqs = random.choice((1, 2, 4, 8)), random.choice((1, 3, 17))
    lengths = torch.tensor([random.choice((0, 1, 63, 64, 65, random.randint(1, 9000))) for _ in range(num_seqs)])
    keys, values, batch = _cache(lengths, kv_heads, head_size, dtype, window=random.choice((None, None, 1, 1000)))
    print(group, head_size, dtype, lengths.tolist(), batch.window)
    q = torch.randn(num_seqs, kv_heads * group + 3, head_size, dtype=dtype, device=CUDA)[:, :-3]
    config = random.choice((None, DecodeConfig(), DecodeConfig(32, 4, 4, 4, run_cost=0), DecodeConfig(128, 2, 4, 2)))
    workspace = DecodeWorkspace.create(NUM_SMS, head_size, CUDA, config)
    expected = native_decode_attention(q, keys, values, batch, head_size**-0.5)
    ours = decode_attention(q, keys, values, batch, head_size**-0.5, workspace, pdl=random.random() < 0.5)
    if lengths.any():
        assert_near(ours, expected)
    assert not ours[lengths.to(CUDA) == 0].any()


@pytest.mark.parametrize("length", [16384, 70000])
def test_decode_attention_of_long_sequences(length: int, dtype: torch.dtype) -> None:
    keys, values, batch = _cache(torch.tensor([length, 5, length // 3]), 8, 128, dtype, window=None)
    q = torch.randn(3, 32, 128, dtype=dtype, device=CUDA)
    workspace = DecodeWorkspace.create(NUM_SMS, 128, CUDA)
    expected = native_decode_attention(q, keys, values, batch, 128**-0.5)
    assert_near(decode_attention(q, keys, values, batch, 128**-0.5, workspace), expected)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("pdl", [False, True])
def test_decode_attention_rotates_and_stores_new_tokens(head_size: int, pdl: bool, dtype: torch.dtype) -> None:
    kv_heads, group, num_seqs = random.choice((1, 4, 8)), random.choice((1, 4, 7, 8)), random.choice((1, 16, 70))
    lengths = torch.tensor([random.choice((0, 1, 64, 65, random.randint(1, 4000))) for _ in range(num_seqs)])
    keys, values, batch = _cache(lengths, kv_heads, head_size, dtype, window=None)
    packed = torch.randn(num_seqs, kv_heads * (group + 2), head_size, dtype=dtype, device=CUDA)
    q, new_keys, new_values = packed.split((kv_heads * group, kv_heads, kv_heads), dim=1)
    angles = torch.rand(4000, head_size // 2, device=CUDA) * 7
    new = NewTokens(new_keys, new_values, RopeTable(angles.cos(), angles.sin()))
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = native_decode_attention(q, expected_keys, expected_values, batch, head_size**-0.5, new)
    workspace = DecodeWorkspace.create(NUM_SMS, head_size, CUDA)
    outs = [decode_attention(q, keys, values, batch, head_size**-0.5, workspace, new, pdl=pdl) for _ in range(20)]
    if lengths.any():
        assert_near(outs[0], expected)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not workspace.arrivals.any()
    for ours, native in ((keys, expected_keys), (values, expected_values)):
        torch.testing.assert_close(ours, native, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_a_graph_serves_lengths_that_grow(dtype: torch.dtype) -> None:
    lengths = torch.tensor([900, 1, 300, 64])
    keys, values, batch = _cache(lengths + 700, 8, 128, dtype, window=None)
    batch.lengths.copy_(lengths)
    q = torch.randn(4, 32, 128, dtype=dtype, device=CUDA)
    workspace = DecodeWorkspace.create(NUM_SMS, 128, CUDA)
    replay, out = _capture(lambda: decode_attention(q, keys, values, batch, 0.09, workspace))
    for _ in range(5):
        batch.lengths.copy_(lengths + torch.randint(0, 700, (4,)))
        replay()
        assert_near(out, native_decode_attention(q, keys, values, batch, 0.09))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("rows", [32, 64, 128])
def test_cascade_attention(group: int, pdl: bool, rows: int, dtype: torch.dtype) -> None:
    """Groups, loners and padding; rotated and stored here or before."""
    kv_heads, head_size = random.choice((1, 2, 8)), random.choice((64, 128))
    prefixes = [random.choice((17, 1000, 4096)), random.choice((64, 300, 20_000))]
    numbers = random.sample(range(50), 50)
    groups = [PrefixGroup(prefixes[0], tuple(numbers[:37])), PrefixGroup(prefixes[1], tuple(numbers[37:42]))]
    keys, values, batch = _shared_cache(groups, numbers[49], kv_heads, head_size, dtype)
    packed = torch.randn(50, kv_heads * (group + 2), head_size, dtype=dtype, device=CUDA)
    q, new_keys, new_values = packed.split((kv_heads * group, kv_heads, kv_heads), dim=1)
    angles = torch.rand(int(batch.lengths.max()), head_size // 2, device=CUDA) * 7
    new = random.choice((None, NewTokens(new_keys, new_values, RopeTable(angles.cos(), angles.sin()))))
    room = CascadeWorkspace.create(
        NUM_SMS, (kv_heads * group, kv_heads, head_size), CUDA, CascadeConfig(rows=rows, warps=8 if rows > 64 else 4)
    )
    workspace = DecodeWorkspace.create(NUM_SMS, head_size, CUDA)._replace(cascade=room)
    cascade = _cascade(groups, batch, room)
    print(kv_heads, head_size, prefixes, new is not None)
    expected = native_decode_attention(q, keys.clone(), values.clone(), batch, head_size**-0.5, new)
    shared = batch._replace(cascade=cascade)
    outs = [decode_attention(q, keys, values, shared, head_size**-0.5, workspace, new, pdl=pdl) for _ in range(20)]
    assert_near(outs[0], expected)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not outs[0][numbers[49]].any() and not workspace.arrivals.any()


def test_a_graph_serves_groups_that_change(dtype: torch.dtype) -> None:
    sizes = [PrefixGroup(2000, tuple(range(37))), PrefixGroup(700, tuple(range(37, 42)))]
    keys, values, batch = _shared_cache(sizes, 49, 8, 128, dtype)
    q = torch.randn(50, 32, 128, dtype=dtype, device=CUDA)
    room = CascadeWorkspace.create(NUM_SMS, (32, 8, 128), CUDA)
    workspace = DecodeWorkspace.create(NUM_SMS, 128, CUDA)._replace(cascade=room)
    expected = native_decode_attention(q, keys, values, batch, 0.09)
    cascade = _cascade(sizes, batch, room)
    shared = batch._replace(cascade=cascade)
    replay, out = _capture(lambda: decode_attention(q, keys, values, shared, 0.09, workspace, pdl=True))
    for _ in range(8):
        groups = [
            PrefixGroup(random.randint(1, each.num_tokens), tuple(random.sample(each.members, 5)))
            for each in random.sample(sizes, random.randint(0, 2))
        ]
        for old, fresh in zip(cascade, _cascade(groups, batch, room), strict=True):
            old.copy_(fresh)
        out.zero_()
        replay()
        assert_near(out, expected)


def _cascade(groups: list[PrefixGroup], batch: DecodeBatch, room: CascadeWorkspace) -> Cascade:
    num_seqs = len(batch.slots)
    numbers = plan_cascade(groups, batch.slots.tolist(), num_seqs, room.shape)
    return as_cascade(torch.tensor(numbers, dtype=torch.int32, device=CUDA), num_seqs, room.shape)


def _shared_cache(
    groups: list[PrefixGroup], padding: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, DecodeBatch]:
    """50 sequences, whose members have copies of what they share."""
    lengths = torch.tensor([random.choice((1, 64, 65, random.randint(1, 900))) for _ in range(50)])
    lengths[padding] = 0
    for group in groups:
        lengths[list(group.members)] += group.num_tokens
    keys, values, batch = _cache(lengths, kv_heads, head_size, dtype, window=None)
    for cache in (keys, values):
        for group in groups:
            slots = batch.slots[list(group.members)].long()
            cache[slots, : group.num_tokens] = cache[slots[0], : group.num_tokens].clone()
    return keys, values, batch


def _capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph.replay, out


def _cache(
    lengths: Tensor, kv_heads: int, head_size: int, dtype: torch.dtype, window: int | None
) -> tuple[Tensor, Tensor, DecodeBatch]:
    """Slots in a random order of a two-layer megacache, NaN wherever nothing was stored."""
    num_slots, columns = len(lengths) + 2, int(lengths.max()) + 5
    region = torch.full((2, num_slots, columns, 2, kv_heads, head_size), float("nan"), dtype=dtype, device=CUDA)
    slots = torch.randperm(num_slots)[: len(lengths)]
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        region[:, slot, :length].normal_()
    batch = DecodeBatch(slots.int().to(CUDA), lengths.int().to(CUDA), window)
    return region[0, :, :, 1], region[1, :, :, 0], batch
