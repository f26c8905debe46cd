"""Decode attention over contiguous and paged memory, by every kernel at hand. Knows no engine."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sarathi.benchmark.kernels.attention import installed_packages
from sarathi.benchmark.kernels.compare import Launch, compare_us, over_copies
from sarathi.benchmark.kernels.inputs import random_tensor
from sarathi.benchmark.kernels.shapes import MODELS, Model, Pages
from sarathi.benchmark.kernels.timing import copies_for
from sarathi.benchmark.records import Record, Table
from sarathi.model_executor.attention.flash_attn.fa3 import PACKAGES, FlashAttention3
from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, VarlenStep, scheduled
from sarathi.model_executor.ops.triton.decode_attention import DecodeConfig, DecodeWorkspace, decode_attention
from sarathi.model_executor.ops.types import DecodeBatch

CONFIGS = [DecodeConfig(tile, programs, warps, stages) for tile, programs, warps, stages in (
    (64, 2, 4, 3), (64, 2, 4, 4), (32, 4, 4, 4), (32, 3, 4, 5), (128, 2, 4, 2), (128, 1, 8, 3), (32, 5, 4, 3),
)]  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Queries and as many copies of a layer's cache as it takes to leave L2, every row full to `context`."""

    model: Model
    batch: int
    context: int
    q: Tensor  # [batch, heads, head_size]
    layers: list[tuple[Tensor, Tensor]]  # [batch, context, kv_heads, head_size] each
    slots: Tensor
    lengths: Tensor

    @classmethod
    def create(cls, model: Model, batch: int, context: int) -> "Inputs":
        shape = (batch, context, model.num_kv_heads, model.head_size)
        copies = copies_for(model.kv_bytes(batch, context))
        layers = [(random_tensor(*shape), random_tensor(*shape)) for _ in range(copies)]
        slots = torch.randperm(batch, device="cuda").int()
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        return cls(
            model, batch, context, random_tensor(batch, model.num_heads, model.head_size), layers, slots, lengths
        )


def warm_up_jobs(
    shapes: list[tuple[Model, int, int]], configs: Sequence[DecodeConfig | None]
) -> Iterator[Callable[[], None]]:
    """One thunk for each Triton kernel that these shapes need, on a short context."""
    paddings = {(model.name, max(16, 4 ** -(-(batch - 1).bit_length() // 2))) for model, batch, _ in shapes}
    for (name, padded), config in itertools.product(sorted(paddings), configs):
        yield lambda n=name, b=padded, c=config: triton_launch(Inputs.create(MODELS[n], b, 256), c)(0)


def measure_decode(
    table: Table, model: Model, batch: int, context: int, pages: Pages, configs: Sequence[DecodeConfig] = ()
) -> None:
    """All kernels at one shape, each checked on a few sequences against float64 first; ratios are to the best paged."""
    inputs = Inputs.create(model, batch, context)
    expected, checked = exact_output(inputs, sequences=2)
    launches, sample = _launches(inputs, configs, pages), over_copies(len(inputs.layers))
    found = compare_us(table.attempts, launches, expected, sample, checked=checked)
    add_paged_first(table, [Record(model.name, "decode", name, batch, context, us, "us") for name, us in found.items()])
    print(f"    floor at 4.5 TB/s {model.kv_bytes(batch, context) / 4.5e6:.1f} us", flush=True)


def add_paged_first(table: Table, rows: list[Record]) -> None:
    """Rows of one shape, each beside the best paged one; FlashAttention's also beside its own binary's page of 16."""
    table.add_compared(sorted(rows, key=lambda row: "paged" not in row.backend), "paged")
    by_backend = {row.backend: row for row in rows}
    for row in rows:
        same_binary = by_backend.get(row.backend.replace("contiguous", "paged 16"))
        if same_binary is not None and same_binary is not row:
            table.add(replace(row, work=f"{row.work}, same binary").beside(same_binary))


def exact_output(inputs: Inputs, sequences: int) -> tuple[Tensor, Tensor]:
    """Float64 attention of the first copy for a few sequences: [n, heads, head_size], and which they are."""
    checked = torch.randperm(inputs.batch, device="cuda")[:sequences]
    model, outputs = inputs.model, []
    for index in checked.tolist():
        keys, values = (x[inputs.slots[index]].double() for x in inputs.layers[0])
        q = inputs.q[index].double().view(model.num_kv_heads, -1, model.head_size)
        scores = torch.einsum("hgd,thd->hgt", q, keys) * model.scale
        outputs.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), values).reshape(model.num_heads, -1))
    return torch.stack(outputs), checked


def triton_launch(inputs: Inputs, config: DecodeConfig | None, *, pdl: bool = False) -> Launch:
    """Our split-KV kernel; None: the shape that it takes by itself."""
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    workspace = DecodeWorkspace.create(sms, inputs.model.head_size, torch.device("cuda"), config)
    batch = DecodeBatch(inputs.slots, inputs.lengths)
    scale = inputs.model.scale
    return lambda i: decode_attention(inputs.q, *inputs.layers[i], batch, scale, workspace, pdl=pdl)


def fa3_launch(inputs: Inputs, package: str, page: int | None) -> Launch:
    """FlashAttention-3 on contiguous memory, or with the same bytes seen as shuffled pages."""
    provider, model, batch = FlashAttention3(package), inputs.model, inputs.batch
    params = AttentionParams(model.num_heads, model.num_kv_heads, model.head_size, torch.bfloat16, model.scale, None)
    layers, rows, table = inputs.layers, inputs.slots, None
    if page:
        rows, (table, layers) = None, as_pages(inputs, page)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    step = VarlenStep(starts, inputs.lengths, rows, table, 1, inputs.context, causal=False)
    step = scheduled(step, provider, params, page or inputs.context)
    return lambda i: provider.attend(inputs.q, layers[i], step, params)


def as_pages(inputs: Inputs, page: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The same tokens in pages scattered over a pool: a block table [batch, pages] and, for each copy, the pools."""
    pages = inputs.context // page
    order = torch.randperm(inputs.batch * pages, device="cuda")
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device="cuda")
    layers = []
    for layer in inputs.layers:
        pools = tuple(x.unflatten(1, (pages, page)).flatten(0, 1)[order] for x in layer)
        layers.append(pools)
    return place.view(inputs.batch, pages)[inputs.slots.long()].int().contiguous(), layers


def flashinfer_launch(inputs: Inputs, page: int, *, contiguous: bool) -> Launch:
    """FlashInfer's paged decode on tensor cores; contiguous: over the slots themselves, their pages in order."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    model, pages = inputs.model, inputs.context // page
    if contiguous:
        table = inputs.slots[:, None] * pages + torch.arange(pages, device="cuda").int()
        layers = [tuple(x.view(-1, page, *x.shape[2:]) for x in layer) for layer in inputs.layers]
    else:
        table, layers = as_pages(inputs, page)
    indptr = torch.arange(inputs.batch + 1, dtype=torch.int32, device="cuda") * pages
    last = torch.full((inputs.batch,), page, dtype=torch.int32, device="cuda")
    scratch = torch.zeros(512 * 2**20, dtype=torch.uint8, device="cuda")
    indices = table.flatten().contiguous()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        scratch, "NHD", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices, paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    wrapper.plan(
        indptr.cpu(), indices, last.cpu(), model.num_heads, model.num_kv_heads, model.head_size, page,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    return lambda i: wrapper.run(inputs.q, layers[i])


def _launches(
    inputs: Inputs, configs: Sequence[DecodeConfig], pages: Pages
) -> Iterator[tuple[str, Callable[[], Launch]]]:
    packages = installed_packages()
    for package in packages:
        yield f"fa3 contiguous ({package})", lambda p=package: fa3_launch(inputs, p, None)
    for config in configs:
        name = "triton " + " ".join(f"{key}={value}" for key, value in config._asdict().items())
        yield name, lambda c=config: triton_launch(inputs, c)
    yield "triton default, overlapped launch", lambda: triton_launch(inputs, None, pdl=True)
    for package, page in itertools.product(packages, pages.fa3):
        if PACKAGES[package].capabilities.block_multiple is not None:
            yield f"fa3 paged {page} ({package})", lambda p=package, n=page: fa3_launch(inputs, p, n)
    for page in pages.flashinfer:
        yield f"flashinfer paged {page}", lambda n=page: flashinfer_launch(inputs, n, contiguous=False)
    if pages.flashinfer:
        yield "flashinfer contiguous as pages of 64", lambda: flashinfer_launch(inputs, 64, contiguous=True)
