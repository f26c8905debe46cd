"""Prefill attention over contiguous and paged memory, whole prompts and chunks. Knows no engine."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.benchmark.kernels.attention import installed_packages
from sarathi.benchmark.kernels.compare import Launch, compare_us
from sarathi.benchmark.kernels.decode import add_paged_first
from sarathi.benchmark.kernels.inputs import random_tensor
from sarathi.benchmark.kernels.shapes import Model, Pages
from sarathi.benchmark.kernels.timing import eager_sample, graph_sample
from sarathi.benchmark.records import Record, Table
from sarathi.model_executor.attention.flash_attn.fa3 import LONG_CHUNK, PACKAGES, FlashAttention3
from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, VarlenStep, scheduled
from sarathi.model_executor.attention.metadata import SlotTokens

_ROUNDS = 5
_SHORT = 2**26  # chunk x context up to which a launch from Python is long beside the kernel


class Inputs(NamedTuple):
    """The last `chunk` tokens of a prompt of `context` tokens whose keys and values all lie in the cache."""

    model: Model
    chunk: int
    context: int
    q: Tensor  # [chunk, heads, head_size]
    keys: Tensor  # [1, context, kv_heads, head_size]
    values: Tensor


def measure_prefill(table: Table, model: Model, chunk: int, context: int, pages: Pages) -> None:
    """All kernels at one shape, the last rows checked against float64 first; ratios are to the best paged."""
    cache = (1, context, model.num_kv_heads, model.head_size)
    q = random_tensor(chunk, model.num_heads, model.head_size)
    inputs = Inputs(model, chunk, context, q, random_tensor(*cache), random_tensor(*cache))
    expected = _exact_last_rows(inputs, 4)
    work = "prefill" if chunk == context else f"prefill {chunk}"
    last = slice(-len(expected), None)
    sample = graph_sample if chunk * context <= _SHORT else eager_sample
    launches, once = _launches(inputs, pages), partial(sample, copies=1)
    found = compare_us(table.attempts, launches, expected, once, checked=last, rounds=_ROUNDS)
    rows = [Record(model.name, work, name, 1, context, us / 1e3, "ms") for name, us in found.items()]
    add_paged_first(table, rows)
    flops = 4 * chunk * (context - (chunk - 1) / 2) * model.num_heads * model.head_size
    print("    TFLOP/s:", ", ".join(f"{row.backend} {flops / row.value / 1e9:.0f}" for row in rows), flush=True)


def _exact_last_rows(inputs: Inputs, count: int) -> Tensor:
    model = inputs.model
    q = inputs.q[-count:].double().view(count, model.num_kv_heads, -1, model.head_size)
    scores = torch.einsum("qhgd,thd->qhgt", q, inputs.keys[0].double()) * model.scale
    place = torch.arange(inputs.context, device="cuda")
    hidden = place[None] > place[-count:, None]
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("qhgt,thd->qhgd", weights, inputs.values[0].double()).flatten(1, 2)


def _fa3(inputs: Inputs, package: str, page: int | None = None, only: SlotTokens | None = None) -> Launch:
    """On pages of so many tokens, or on contiguous memory, as a batch of one, or as the tensor of one sequence."""
    provider, model, chunk, context = FlashAttention3(package), inputs.model, inputs.chunk, inputs.context
    params = AttentionParams(model.num_heads, model.num_kv_heads, model.head_size, torch.bfloat16, model.scale, None)
    rows, table, cache = torch.zeros(1, dtype=torch.int32, device="cuda"), None, (inputs.keys, inputs.values)
    if page:
        rows, (table, cache) = None, _as_pages(inputs, page)
    starts, lengths = (torch.tensor(each, dtype=torch.int32, device="cuda") for each in ([0, chunk], [context]))
    step = VarlenStep(starts, lengths, rows, table, chunk, context, causal=True, only=only)
    step = scheduled(step, provider, params, page or context)
    return lambda _: provider.attend(inputs.q, cache, step, params)


def _as_pages(inputs: Inputs, page: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    pages = inputs.context // page
    order = torch.randperm(pages, device="cuda")
    place = torch.empty_like(order)
    place[order] = torch.arange(pages, device="cuda")
    pools = tuple(x[0].unflatten(0, (pages, page))[order] for x in (inputs.keys, inputs.values))
    return place[None].int().contiguous(), pools


def _flashinfer_paged(inputs: Inputs, page: int, backend: str) -> Launch:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    model, (table, cache) = inputs.model, _as_pages(inputs, page)
    scratch = torch.zeros(512 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD", backend=backend)
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (inputs.chunk, table.shape[1])]
    wrapper.plan(
        *ends, table.flatten(), torch.tensor([page], dtype=torch.int32), model.num_heads, model.num_kv_heads,
        model.head_size, page, causal=True, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    return lambda _: wrapper.run(inputs.q, cache)


def _flashinfer_single(inputs: Inputs, backend: str) -> Launch:
    from flashinfer import single_prefill_with_kv_cache

    return lambda _: single_prefill_with_kv_cache(
        inputs.q, inputs.keys[0], inputs.values[0], causal=True, backend=backend
    )


def _launches(inputs: Inputs, pages: Pages) -> Iterator[tuple[str, Callable[[], Launch]]]:
    packages = installed_packages()
    for package in packages:
        yield f"fa3 contiguous ({package})", lambda p=package: _fa3(inputs, p)
        if PACKAGES[package].has_single and inputs.chunk >= LONG_CHUNK:
            only = SlotTokens(0, inputs.context)
            yield f"fa3 contiguous, one sequence ({package})", partial(_fa3, inputs, package, only=only)
    for package, page in itertools.product(packages, pages.fa3):
        if PACKAGES[package].capabilities.block_multiple is not None:
            yield f"fa3 paged {page} ({package})", lambda p=package, n=page: _fa3(inputs, p, n)
    if pages.flashinfer:
        yield "flashinfer contiguous fa3", lambda: _flashinfer_single(inputs, "fa3")
    for page in pages.flashinfer:
        yield f"flashinfer paged {page} fa3", lambda n=page: _flashinfer_paged(inputs, n, "fa3")
