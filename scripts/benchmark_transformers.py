"""Measure transformers' `generate` with DynamicCache, StaticCache and VirtualCache, time and memory: transformers.csv.

    python scripts/benchmark_transformers.py --output DIR                                    # SmolLM2's sizes, a CPU
    python scripts/benchmark_transformers.py --model llama-3-8b --device cuda --output DIR
    python scripts/benchmark_transformers.py --test

Random weights. Each run has a process of its own; caches alternate, and records are medians. VirtualCache and one
StaticCache have room for --max-tokens, as for outputs of unknown length; the other StaticCache for exactly the tokens
used. The peak is the memory beyond the loaded model: resident memory on a CPU, torch's and the cache's on a GPU.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from sarathi.benchmark.config.program import positive
from sarathi.benchmark.engines.vllm import save_config
from sarathi.benchmark.records import Record, Table
from sarathi.entrypoints.script import run_script
from sarathi.model_executor.loader.source import resolve_model
from vattention.transformers import VirtualCache

MIB = 2**20
DYNAMIC, EXACT = "DynamicCache", "StaticCache, length known"
CACHES = (DYNAMIC, "StaticCache", EXACT, "VirtualCache")
UNITS = {"the prompt": "s", "a token": "ms", "the cache at its peak": "MiB", "the process at its peak": "MiB"}
SHORT = ("--max-tokens", "256", "--repeats", "1", "--output", "results/test/transformers")


class Work(NamedTuple):
    name: str
    batch: int
    prompt: int  # tokens of each sequence
    new: int


FULL = (Work("long prompt", 1, 2048, 16), Work("long generation", 4, 16, 128))
SMALL = (Work("long prompt", 2, 96, 6),)


class Clock(BaseStreamer):
    """A streamer that records the times of the prompt and of each token."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(options: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    source = resolve_model(options.model, weights=False).path
    with tempfile.TemporaryDirectory() as folder:
        if source.suffix == ".gguf":
            config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        else:
            config = AutoConfig.from_pretrained(save_config(options.model, options.max_tokens, Path(folder)))
    if options.test:
        config.num_hidden_layers = 2
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


def new_cache(name: str, model: PreTrainedModel, work: Work, max_tokens: int) -> Cache:
    if name == DYNAMIC:
        return DynamicCache(config=model.config)
    if name == "VirtualCache":
        budget_bytes = 2**40 if model.device.type == "cpu" else torch.cuda.mem_get_info()[0] * 9 // 10
        return VirtualCache(model.config, max_tokens=max_tokens, budget_bytes=budget_bytes, max_batch_size=work.batch)
    return StaticCache(model.config, max_cache_len=work.prompt + work.new if name == EXACT else max_tokens)


def cache_bytes(cache: Cache) -> int:
    if isinstance(cache, VirtualCache):
        return cache.stats().peak_mapped_bytes
    return sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))


def resident_bytes(kind: str) -> int:
    """VmRSS: current resident memory; VmHWM: the peak since reset_peak()."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


class Peak:
    """Peak memory since construction, minus the memory held at construction. A VirtualCache is not torch's memory."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before_bytes = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._before_bytes = resident_bytes("VmRSS")

    def bytes_with(self, cache: Cache) -> int:
        if not self._is_cuda:
            return resident_bytes("VmHWM") - self._before_bytes
        outside = cache_bytes(cache) if isinstance(cache, VirtualCache) else 0
        return torch.cuda.max_memory_allocated() - self._before_bytes + outside


def measure(name: str, work: Work, options: argparse.Namespace) -> list[float]:
    """Measure one run in this process; values in the order of UNITS, token times as median."""
    model = load(options)
    prompt = torch.randint(model.config.vocab_size, (work.batch, work.prompt), device=model.device)
    ask: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    model.generate(prompt[:, :8], attention_mask=torch.ones_like(prompt[:, :8]), max_new_tokens=2, **ask)  # warm-up
    ask["attention_mask"] = torch.ones_like(prompt)
    cache, clock, peak = new_cache(name, model, work, options.max_tokens), Clock(), Peak(model.device)
    model.generate(prompt, max_new_tokens=work.new, past_key_values=cache, streamer=clock, **ask)
    spans_s = [after - before for before, after in zip(clock.times_s, clock.times_s[1:], strict=False)]
    held, most = cache_bytes(cache), peak.bytes_with(cache)
    return [spans_s[0], statistics.median(spans_s[1:]) * 1e3, held / MIB, most / MIB]


def records_of(name: str, work: Work, model: str, runs: list[list[float]]) -> list[Record]:
    """Records with the medians of a cache's runs."""
    medians = map(statistics.median, zip(*runs, strict=True))
    return [
        Record(model, f"{work.name}: {what}", name, work.batch, work.prompt + work.new, value, unit)
        for (what, unit), value in zip(UNITS.items(), medians, strict=True)
    ]


def compare(table: Table, work: Work, options: argparse.Namespace) -> None:
    """Alternate all caches, each run in a new process."""
    runs: dict[str, list[list[float]]] = {name: [] for name in CACHES}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(options.repeats):
            for name in CACHES:
                runs[name].append(pool.apply(measure, (name, work, options)))
    found = {name: records_of(name, work, options.model, runs[name]) for name in CACHES}
    for name, records in found.items():
        for record, dynamic in zip(records, found[DYNAMIC], strict=True):
            table.add(record if name == DYNAMIC else record.compared_to(dynamic))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a shipped name, for its sizes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--max-tokens", type=positive, default=8192, help="of a sequence")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/transformers"))
    parser.add_argument("--test", action="store_true", help="a short form: two layers, few tokens, once")
    options = parser.parse_args()
    return parser.parse_args([*SHORT, *sys.argv[1:]]) if options.test else options


def main() -> int:
    options = read_options()
    table = Table(options.output / "transformers.csv")
    for work in SMALL if options.test else FULL:
        table.attempts.run(work.name, lambda: compare(table, work, options))  # noqa: B023
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
