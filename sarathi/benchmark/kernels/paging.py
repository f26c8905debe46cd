"""Attention on contiguous and on paged memory: decodes, whole prompts and chunks."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sarathi.benchmark.kernels.attention import Attend, Equal, Layer, flash_attention, installed_packages, triton_decode
from sarathi.benchmark.kernels.shapes import MODELS, Model, Pages, random_tensor
from sarathi.benchmark.kernels.timing import Launch, Sample, compare_us, copies_for, eager_sample, graph_sample
from sarathi.benchmark.records import Record, Table
from sarathi.model_executor.attention.flash_attn.fa3 import LONG_CHUNK, PACKAGES
from sarathi.model_executor.ops.triton.attention.decode import DecodeConfig

CONFIGS = [DecodeConfig(tile, programs, warps, stages) for tile, programs, warps, stages in (
    (64, 2, 4, 3), (64, 2, 4, 4), (32, 4, 4, 4), (32, 3, 4, 5), (128, 2, 4, 2), (128, 1, 8, 3), (32, 5, 4, 3),
)]  # fmt: skip
_ROUNDS = {"decode": 7, "prefill": 5}
_SHORT = 2**26  # chunk x context up to which a launch from Python is long beside the kernel
_CHECKED = 2, 4  # sequences, and last tokens of each, whose output is compared with float64
_SCRATCH_BYTES = 512 * 2**20  # FlashInfer's workspace
Named = Iterator[tuple[str, Callable[[], Launch]]]  # a kernel's name, and what prepares it


@dataclass(frozen=True)
class Inputs:
    """The last `new` tokens of each sequence as queries, and copies of a layer's cache with all slots full."""

    model: Model
    shape: Equal
    q: Tensor  # [batch * new, heads, head_size]
    layers: list[Layer]  # [batch, length, kv_heads, head_size] each
    slots: Tensor  # [batch] int32, in random order

    @classmethod
    def create(cls, model: Model, batch: int, new: int, context: int, copies: int) -> "Inputs":
        cache = (batch, context, model.num_kv_heads, model.head_size)
        layers = [(random_tensor(*cache), random_tensor(*cache)) for _ in range(copies)]
        q = random_tensor(batch * new, model.num_heads, model.head_size)
        return cls(model, Equal(batch, new, context, context), q, layers, torch.randperm(batch, device="cuda").int())

    def launch(self, attend: Attend, layers: Sequence[Layer] | None = None) -> Launch:
        """A launch on copy i of the cache, or of `layers`, the same tokens in another layout."""
        layers = layers or self.layers
        return lambda i: attend(self.q, layers[i])


def decode_inputs(model: Model, batch: int, context: int) -> Inputs:
    """One new token per sequence, and enough copies of the cache to exceed L2."""
    return Inputs.create(model, batch, 1, context, copies_for(model.kv_bytes(batch, context)))


def warm_up_jobs(
    shapes: list[tuple[Model, int, int]], configs: Sequence[DecodeConfig | None]
) -> Iterator[Callable[[], None]]:
    """One thunk for each Triton kernel that these decodes need, on a short context."""
    paddings = {(model.name, max(16, 4 ** -(-(batch - 1).bit_length() // 2))) for model, batch, _ in shapes}
    for (name, padded), config in itertools.product(sorted(paddings), configs):
        yield lambda n=name, b=padded, c=config: _triton(decode_inputs(MODELS[n], b, 256), c)(0)


def measure_decode(
    table: Table, model: Model, batch: int, context: int, pages: Pages, configs: Sequence[DecodeConfig] = ()
) -> None:
    """Check and measure every kernel on decodes of one shape. Ratios are to the best paged kernel."""
    inputs = decode_inputs(model, batch, context)
    sample = partial(graph_sample, copies=len(inputs.layers))
    found = _compare(table, inputs, _decode_kernels(inputs, configs, pages), sample, _ROUNDS["decode"])
    add_paged_first(table, [Record(model.name, "decode", name, batch, context, us, "us") for name, us in found.items()])
    print(f"    floor at 4.5 TB/s {model.kv_bytes(batch, context) / 4.5e6:.1f} us", flush=True)


def measure_prefill(table: Table, model: Model, chunk: int, context: int, pages: Pages) -> None:
    """Measure prefill of the last `chunk` tokens of a `context`-token prompt. Ratios are to the best paged kernel."""
    inputs = Inputs.create(model, 1, chunk, context, copies=1)
    sample = partial(graph_sample if chunk * context <= _SHORT else eager_sample, copies=1)
    found = _compare(table, inputs, _prefill_kernels(inputs, pages), sample, _ROUNDS["prefill"])
    work = "prefill" if chunk == context else f"prefill {chunk}"
    records = [Record(model.name, work, name, 1, context, us / 1e3, "ms") for name, us in found.items()]
    add_paged_first(table, records)
    flops = 4 * chunk * (context - (chunk - 1) / 2) * model.num_heads * model.head_size
    print("    TFLOP/s:", ", ".join(f"{each.backend} {flops / each.value / 1e9:.0f}" for each in records), flush=True)


def _compare(
    table: Table, inputs: Inputs, kernels: Named, sample: Callable[[Launch], Sample], rounds: int
) -> dict[str, float]:
    expected, checked = exact_output(inputs)
    return compare_us(table.attempts, kernels, expected, sample, checked=checked, rounds=rounds)


def add_paged_first(table: Table, records: list[Record]) -> None:
    """Add the records of one shape with their ratios to the best paged kernel.

    FlashAttention is also compared with itself on pages of 16.
    """
    table.add_compared(sorted(records, key=lambda record: "paged" not in record.backend), "paged")
    by_backend = {record.backend: record for record in records}
    for record in records:
        same_binary = by_backend.get(record.backend.replace("contiguous", "paged 16"))
        if same_binary is not None and same_binary is not record:
            table.add(replace(record, work=f"{record.work}, same binary").compared_to(same_binary))


def exact_output(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Float64 attention of the last tokens of a few sequences, [n, heads, head_size], and their indices in q."""
    (batch, new, length, _), model = inputs.shape, inputs.model
    sequences = torch.randperm(batch, device="cuda")[: _CHECKED[0]]
    tokens = torch.arange(max(new - _CHECKED[1], 0), new, device="cuda")
    hidden = torch.arange(length, device="cuda") > tokens[:, None] + length - new  # [tokens, length]
    outputs = []
    for index in sequences.tolist():
        keys, values = (x[inputs.slots[index]].double() for x in inputs.layers[0])
        q = inputs.q[index * new + tokens].double().unflatten(1, (model.num_kv_heads, -1))
        scores = torch.einsum("qhgd,thd->qhgt", q, keys) * model.scale
        weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
        outputs.append(torch.einsum("qhgt,thd->qhgd", weights, values).flatten(1, 2))
    return torch.cat(outputs), (sequences[:, None] * new + tokens).flatten()


def as_pages(inputs: Inputs, page: int) -> tuple[Tensor, list[Layer]]:
    """The same tokens in randomly placed pages: a block table [batch, pages] and the page pools of each copy."""
    pages = inputs.shape.length // page
    order = torch.randperm(inputs.shape.batch * pages, device="cuda")
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device="cuda")

    def pool(x: Tensor) -> Tensor:
        return x.unflatten(1, (pages, page)).flatten(0, 1)[order]

    table = place.view(inputs.shape.batch, pages)[inputs.slots.long()].int().contiguous()
    return table, [(pool(keys), pool(values)) for keys, values in inputs.layers]


def _decode_kernels(inputs: Inputs, configs: Sequence[DecodeConfig], pages: Pages) -> Named:
    for package in installed_packages():
        yield f"fa3 contiguous ({package})", partial(_flash, inputs, package)
    for config in configs:
        name = "triton " + " ".join(f"{key}={value}" for key, value in config._asdict().items())
        yield name, partial(_triton, inputs, config)
    yield "triton default, overlapped launch", partial(_triton, inputs, None, pdl=True)
    yield from _flash_paged_kernels(inputs, pages)
    for page in pages.flashinfer:
        yield f"flashinfer paged {page}", partial(_flashinfer_decode, inputs, page, contiguous=False)
    if pages.flashinfer:
        yield "flashinfer contiguous as pages of 64", partial(_flashinfer_decode, inputs, 64, contiguous=True)


def _prefill_kernels(inputs: Inputs, pages: Pages) -> Named:
    for package in installed_packages():
        yield f"fa3 contiguous ({package})", partial(_flash, inputs, package)
        if PACKAGES[package].has_single and inputs.shape.new >= LONG_CHUNK:
            yield f"fa3 contiguous, one sequence ({package})", partial(_flash, inputs, package, single=True)
    yield from _flash_paged_kernels(inputs, pages)
    if pages.flashinfer:
        yield "flashinfer contiguous fa3", partial(_flashinfer_single, inputs, "fa3")
    for page in pages.flashinfer:
        yield f"flashinfer paged {page} fa3", partial(_flashinfer_prefill, inputs, page, "fa3")


def _flash_paged_kernels(inputs: Inputs, pages: Pages) -> Named:
    for package, page in itertools.product(installed_packages(), pages.fa3):
        if PACKAGES[package].capabilities.block_multiple is not None:
            yield f"fa3 paged {page} ({package})", partial(_flash_paged, inputs, package, page)


def _flash(inputs: Inputs, package: str, *, single: bool = False) -> Launch:
    return inputs.launch(flash_attention(inputs.model, package, inputs.shape, inputs.slots, single=single))


def _flash_paged(inputs: Inputs, package: str, page: int) -> Launch:
    block_table, layers = as_pages(inputs, page)
    shape = inputs.shape._replace(columns=page)
    return inputs.launch(flash_attention(inputs.model, package, shape, None, block_table), layers)


def _triton(inputs: Inputs, config: DecodeConfig | None, *, pdl: bool = False) -> Launch:
    return inputs.launch(triton_decode(inputs.model, inputs.shape, inputs.slots, config, pdl=pdl))


def _flashinfer_decode(inputs: Inputs, page: int, *, contiguous: bool) -> Launch:
    """FlashInfer's paged decode on tensor cores. contiguous: the pages are the slots' memory, in order."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    model, batch, pages = inputs.model, inputs.shape.batch, inputs.shape.length // page
    if contiguous:
        table = inputs.slots[:, None] * pages + torch.arange(pages, device="cuda").int()
        layers = [(k.view(-1, page, *k.shape[2:]), v.view(-1, page, *v.shape[2:])) for k, v in inputs.layers]
    else:
        table, layers = as_pages(inputs, page)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages
    last = torch.full((batch,), page, dtype=torch.int32, device="cuda")
    indices = table.flatten().contiguous()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _scratch(), "NHD", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices, paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    wrapper.plan(
        indptr.cpu(), indices, last.cpu(), model.num_heads, model.num_kv_heads, model.head_size, page,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    return inputs.launch(wrapper.run, layers)


def _flashinfer_prefill(inputs: Inputs, page: int, backend: str) -> Launch:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    model, (table, layers) = inputs.model, as_pages(inputs, page)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_scratch(), "NHD", backend=backend)
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (inputs.shape.new, table.shape[1])]
    wrapper.plan(
        *ends, table.flatten(), torch.tensor([page], dtype=torch.int32), model.num_heads, model.num_kv_heads,
        model.head_size, page, causal=True, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    return inputs.launch(wrapper.run, layers)


def _flashinfer_single(inputs: Inputs, backend: str) -> Launch:
    from flashinfer import single_prefill_with_kv_cache

    keys, values = (x[0] for x in inputs.layers[0])
    return lambda _: single_prefill_with_kv_cache(inputs.q, keys, values, causal=True, backend=backend)


def _scratch() -> Tensor:
    return torch.zeros(_SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
