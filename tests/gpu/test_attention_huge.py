"""Attention over reservations of terabytes: slots at both ends are attended like any others, by every backend.

Of a region of [slots, tokens, layers, heads, dim] a TMA descriptor (FlashAttention 3 and 4) holds strides below 2^40
bytes, and a block table (FlashAttention 2 and 4, FlashInfer) numbers below 2^31: see attention/slot_pages.py. Each case
runs in a process of its own, because a CUDA error is the end of a process's context.
"""

import os
import random
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vattention._native", reason="the native module is not built")

pytestmark = pytest.mark.gpu
NAMES = (
    "fa_vattn_megacache",
    "fa3_vattn_megacache",
    "fi_vattn_megacache",
    "fa2_vattn_megacache",
    "fa4_vattn_megacache",
)
CASE = """
import sys
import torch
from attention_calls import store
from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer, SlotAddress
from sarathi.model_executor.attention.base import create_backend
from sarathi.model_executor.attention.metadata import StaticStep
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.placement import Placement
from sarathi.model_executor.rope import Rope
from vattention import DeviceError, VirtualKVCache

name, num_slots, max_tokens, seed = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(seed)
LAYERS, HEADS, KV_HEADS, DIM, LENGTH = 32, 32, 8, 128, 6000
arch = ModelArchitecture("test", LAYERS, 64, 64, HEADS, KV_HEADS, DIM, 100, max_tokens, 1e-5, Rope(1e4))
cuda = torch.device("cuda")
backend = create_backend(BackendSpec.parse(name), arch, Placement(torch.bfloat16, cuda))
keys, values = torch.randn(2, 4, LENGTH, KV_HEADS, DIM, device=cuda).bfloat16()


def exact(query, sequence, start):
    picked = torch.randperm(len(query), device=cuda)[:64]
    length = start + len(query)
    k, v = (x[sequence, :length].double() for x in (keys, values))
    scores = torch.einsum("qhgd,khd->hgqk", query[picked].double().unflatten(1, (KV_HEADS, -1)), k) * DIM**-0.5
    hidden = torch.arange(length, device=cuda) > start + picked[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return picked, torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2)


def check(out, query, chunks):
    first = 0
    for chunk in chunks:
        own, result = (x[first : first + chunk.num_tokens] for x in (query, out))
        picked, expected = exact(own, int(chunk.request_id), chunk.start)
        error = ((result[picked].double() - expected).norm() / expected.norm()).item()
        assert error < 1e-2, (chunk, error)
        first += chunk.num_tokens


def tokens_of(chunks):
    ranges = [(int(c.request_id), slice(c.start, c.start + c.num_tokens)) for c in chunks]
    new = [torch.cat([x[each, tokens] for each, tokens in ranges]) for x in (keys, values)]
    return torch.randn(len(new[0]), HEADS, DIM, device=cuda).bfloat16(), *new


try:
    cache = VirtualKVCache(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_size=DIM, num_slots=num_slots, max_tokens=max_tokens,
        dtype=torch.bfloat16, device="cuda", budget_bytes=4 * 2**30, megacache=True,
    )
except DeviceError as error:
    sys.exit(f"no addresses: {error}")
with cache, torch.inference_mode():
    slots = (num_slots - 1, 0, num_slots // 2, 1)
    for slot in slots:
        cache.claim(slot)
    layer = CacheLayer(*cache.layer(LAYERS - 1), None)
    lengths = [0] * 4
    # mixed chunks; decodes; decodes, then a long chunk; one sequence alone: a long chunk, a short one, a decode
    for counts in ([300, 3000, 5, 1], [1, 1, 1, 1], [1, 1, 1, 2300], [2500, 0, 0, 0], [7, 0, 0, 0], [1, 0, 0, 0]):
        chunks = tuple(Chunk(str(i), lengths[i], n, True, lengths[i] + n) for i, n in enumerate(counts) if n)
        here = tuple(slots[int(chunk.request_id)] for chunk in chunks)
        ends = [chunk.start + chunk.num_tokens for chunk in chunks]
        cache.prepare(list(here), [end + backend.capabilities.over_read_tokens for end in ends])
        query, key, value = tokens_of(chunks)
        positions = torch.zeros(len(query), dtype=torch.int64, device=cuda)
        metadata = backend.plan(Batch(chunks, positions, positions, None), SlotAddress(here))
        store(backend, key, value, layer, metadata)
        check(backend.attend(query, layer, metadata).view_as(query), query, chunks)
        lengths = [length + n for length, n in zip(lengths, counts)]
    print("can capture:", backend.can_capture(layer))
    if backend.can_capture(layer):
        static = StaticStep(4, max_tokens, 0, cuda)
        query, key, value = (torch.zeros(4, n, DIM, device=cuda).bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS))

        def work():
            metadata = backend.plan_static(static.step)
            store(backend, key, value, layer, metadata)
            return backend.attend(query, layer, metadata)

        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work()
        for count in (4, 2):
            chunks = tuple(Chunk(str(i), lengths[i], 1, True, lengths[i] + 1) for i in range(count))
            cache.prepare(list(slots[:count]), [n + 1 + backend.capabilities.over_read_tokens for n in lengths[:count]])
            for mine, new in zip((query, key, value), tokens_of(chunks)):
                mine[:count] = new
            static.fill(chunks, SlotAddress(slots[:count]))
            graph.replay()
            check(out.view_as(query)[:count], query[:count], chunks)
            lengths = [n + (i < count) for i, n in enumerate(lengths)]
    for index, slot in enumerate(slots):
        for kept, expected in ((layer.k, keys), (layer.v, values)):
            assert torch.equal(kept[slot, : lengths[index]], expected[index, : lengths[index]])
print("right")
"""
ENGINE = """
from sarathi import LLM, SamplingParams

prompts = [[7 * i % 1000 for i in range(3000)], [11 * i % 1000 for i in range(40)]]
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
outputs = []
for max_num_seqs in (4, 1024):
    with LLM("smollm2-135m", load_format="dummy", attention_backend="fa_vattn_megacache", max_model_len=131072,
             max_num_seqs=max_num_seqs, memory_bytes=2**30) as llm:
        outputs.append([each.outputs[0].token_ids for each in llm.generate(prompts, params)])
assert outputs[0] == outputs[1], outputs
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # helpers of tests too
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    for reason in ("KernelUnavailableError", "no addresses"):
        if reason in done.stderr:
            pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("num_slots", "max_tokens"),
    [(1025, 40000), (8192, 40000), (5, 17_000_000)],
    ids=["2.7 TB a region", "21 TB a region", "1.1 TB a slot"],
)
@pytest.mark.parametrize("name", NAMES)
def test_slots_at_both_ends(name: str, num_slots: int, max_tokens: int) -> None:
    """With Llama-3-8B's 64 KiB a token: 17 million of them are more than 2^40 bytes."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    out = run(CASE, name, num_slots, max_tokens, seed)
    is_reached = max_tokens * 65536 < 2**40 or name.startswith(("fa_", "fa2", "fa4"))
    assert f"can capture: {is_reached and not name.startswith('fi')}" in out and "right" in out


def test_an_engine_with_more_than_a_terabyte_a_region() -> None:
    """1,025 slots of 131,072 tokens of 11.25 KiB are 1.5 TB. The first prompt is long enough for a call by itself."""
    run(ENGINE)
