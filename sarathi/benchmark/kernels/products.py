"""Matrix products of a decode step: cuBLAS, and all configurations of the matrix-vector and skinny kernels."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sarathi.benchmark.kernels.shapes import Model, random_tensor
from sarathi.benchmark.kernels.timing import copies_for, graph_us
from sarathi.benchmark.records import Record, Table
from sarathi.model_executor.ops.triton.matvec import Epilogue, MatvecConfig, matvec
from sarathi.model_executor.ops.triton.skinny import MAX_TILES, SkinnyConfig, skinny

MATVEC = [MatvecConfig(rows, block, warps) for rows, block, warps in (
    (2, 2048, 8), (1, 2048, 8), (4, 2048, 8), (2, 1024, 4), (1, 4096, 8), (2, 4096, 16),
)]  # fmt: skip
SKINNY = [SkinnyConfig(n, k, splits, stages) for (n, k, stages), splits in itertools.product(
    ((64, 128, 4), (64, 256, 3), (64, 128, 3), (128, 128, 3)), (1, 2, 3, 4, 6)
)]  # fmt: skip


def warm_up_jobs() -> Iterator[Callable[[], None]]:
    """One thunk per kernel of ``measure_product``, on inputs just large enough to compile it."""
    for size, config, gated in itertools.product((4096, 14336, 11008), MATVEC, (False, True)):
        if not (gated and size != 4096):
            yield lambda s=size, c=config, g=gated: _matvec(random_tensor(1, s), random_tensor(256, s), c, gated=g)
    for config, gated in itertools.product(SKINNY, (False, True)):
        yield lambda c=config, g=gated: _skinny(
            random_tensor(8, 4096), random_tensor(256, 4096), c, _counters(), gated=g
        )


def measure_product(table: Table, model: Model, name: str, batch: int) -> None:
    """Measure the best configuration and cuBLAS for one matrix and batch size; checks the best against float32."""
    outputs, inputs = model.weights[name]
    weights = [random_tensor(outputs, inputs) / inputs**0.5 for _ in range(copies_for(outputs * inputs * 2, limit=12))]
    x = random_tensor(batch, inputs)
    gated = name == "gate_up"
    times = {"cublas": graph_us(lambda i: torch.nn.functional.linear(x, weights[i]), len(weights))}
    candidates = _candidates(batch, inputs, outputs, gated=gated)
    for config, launch in candidates.items():
        times[config] = graph_us(lambda i, launch=launch: launch(x, weights[i]), len(weights))
    floor = outputs * inputs * 2 / 4.5e6
    rows = [Record(model.name, f"product {name}", key, batch, 0, value, "us") for key, value in times.items()]
    best = min(rows[1:], key=lambda row: row.value)
    error = _error(candidates[best.backend](x, weights[0]), x, weights[0], gated=gated)
    table.add_compared([rows[0], *sorted(rows[1:], key=lambda row: row.value)[:3]], "cublas")
    print(f"    floor at 4.5 TB/s {floor:.1f} us; error of the best {error:.1e}", flush=True)
    if not error < 1e-2:
        raise ValueError(f"{best.backend} is wrong: error {error}")


def _candidates(batch: int, inputs: int, outputs: int, *, gated: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Configurations by name, without those that need too many waves of programs."""
    if batch == 1:
        return {
            f"matvec rows={c.rows} k={c.block_k} warps={c.warps}": lambda x, w, c=c: _matvec(x, w, c, gated=gated)
            for c in MATVEC
        }
    counters, found = _counters(), {}
    for c in SKINNY:
        programs = outputs // (2 if gated else 1) // c.block_n * c.splits
        if inputs % c.block_k == 0 and (c.splits == 1 or programs <= 132 * 4):
            name = f"skinny n={c.block_n} k={c.block_k} splits={c.splits} stages={c.stages}"
            found[name] = lambda x, w, c=c: _skinny(x, w, c, counters, gated=gated)
    return found


def _matvec(x: Tensor, weight: Tensor, config: MatvecConfig, *, gated: bool) -> Tensor:
    out = _out(x, weight, gated=gated)
    matvec(x, weight, out, Epilogue(gated=gated), config)
    return out


def _skinny(x: Tensor, weight: Tensor, config: SkinnyConfig, counters: Tensor, *, gated: bool) -> Tensor:
    out = _out(x, weight, gated=gated)
    skinny(x, weight, out, Epilogue(gated=gated), config, counters)
    return out


def _error(out: Tensor, x: Tensor, weight: Tensor, *, gated: bool) -> float:
    exact = x.double() @ weight.double().t()
    if gated:
        gate, up = exact.chunk(2, dim=-1)
        exact = torch.nn.functional.silu(gate) * up
    return ((out.double() - exact).norm() / exact.norm()).item()


def _out(x: Tensor, weight: Tensor, *, gated: bool) -> Tensor:
    return torch.empty((x.shape[0], weight.shape[0] // (2 if gated else 1)), dtype=x.dtype, device=x.device)


def _counters() -> Tensor:
    return torch.zeros(MAX_TILES, dtype=torch.int32, device="cuda")
