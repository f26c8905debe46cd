"""A whole model on the Triton operations, in Triton's interpreter, against the same model on the torch ones.

Steps are those of a GPU: FlashAttention for prefills, by a stand-in for the library, and our decode kernel for decodes.
"""

import importlib.util
import os
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

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
if numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter needs numpy < 2.4 for loops", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before the imports below

from test_attention_plumbing import FakeLibrary

from sarathi.messages import Chunk
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer, SlotAddress
from sarathi.model_executor.attention.flash_attn.backend import FlashAttentionBackend
from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode
from sarathi.model_executor.attention.sdpa.backend import SdpaBackend
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.ops.native import NativeOps
from sarathi.model_executor.ops.triton.ops import TritonOps
from sarathi.model_executor.placement import Placement
from sarathi.model_executor.rope import Rope

CPU = torch.device("cpu")
ARCH = ModelArchitecture(
    "tiny", num_layers=2, hidden_size=128, intermediate_size=256, num_heads=8, num_kv_heads=2, head_size=16,
    vocab_size=50, max_positions=32, rms_norm_eps=1e-5, rope=Rope(theta=1e4),
)  # fmt: skip
FAMILIES = {
    "llama": ARCH,
    "all biases": replace(ARCH, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qwen2": replace(ARCH, qkv_bias=True, tie_embeddings=True),
    "qwen3": replace(ARCH, qk_norm=True),
    "windowed": replace(ARCH, sliding_window=4, full_attention_layers=frozenset({0})),
}
STEPS = (  # of each sequence: tokens in the cache, new tokens
    ((0, 9), (0, 3)), ((9, 1), (3, 1)), ((10, 1),), ((11, 1), (4, 6)), ((12, 2), (10, 1)),
)  # fmt: skip


def on_triton(arch: ModelArchitecture, place: Placement) -> Decoder:
    ops = TritonOps(CPU)
    backend = FlashAttentionBackend(
        FakeLibrary(contiguous=True, paged=False), arch, place, TritonDecode(arch.head_size, CPU)
    )
    backend._ops = ops
    return Decoder(arch, place, ops, backend, arch.max_positions)


def logits_of(model: Decoder, arch: ModelArchitecture, place: Placement, tokens: Tensor) -> list[Tensor]:
    """Of each step; the last tokens of decodes are placeholders, as in steps in flight."""
    shape = (2, 3, arch.max_positions, arch.num_kv_heads, arch.head_size)
    cache = [CacheLayer(*torch.zeros(shape, dtype=place.dtype), arch.window_of(i)) for i in range(arch.num_layers)]
    backend, slots, results = model.layers[0].attention.backend, (2, 0), []
    for step in STEPS:
        chunks = tuple(Chunk(str(i), start, new, True, start + new) for i, (start, new) in enumerate(step))
        positions = torch.cat([torch.arange(start, start + new) for start, new in step]).int()
        ids = torch.cat([tokens[i, start : start + new] for i, (start, new) in enumerate(step)]).int()
        last_tokens = torch.zeros(4, dtype=torch.int64)
        if all(new == 1 for _, new in step):
            last_tokens[list(slots[: len(step)])] = ids.long()
            ids = torch.tensor([-1 - slot for slot in slots[: len(step)]]).int()
        lasts = torch.tensor([new for _, new in step]).cumsum(0).int() - 1
        batch = Batch(chunks, ids, positions, None if len(lasts) == len(ids) else lasts)
        results.append(model(batch, cache, backend.plan(batch, SlotAddress(slots[: len(step)])), last_tokens))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_torch_operations(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    arch, place = FAMILIES[family], Placement(dtype, CPU)
    ours = on_triton(arch, place)
    native = Decoder(arch, place, NativeOps(), SdpaBackend(arch, place), arch.max_positions)
    for (_, parameter), (_, other) in zip(ours.parameters(), native.parameters(), strict=True):
        other.copy_(torch.nn.init.normal_(parameter, std=0.15))
    native.pack()
    tokens = torch.randint(0, arch.vocab_size, (2, 32))
    with torch.inference_mode():
        found, expected = (logits_of(model, arch, place, tokens) for model in (ours, native))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **close)
