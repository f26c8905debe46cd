"""Our engine beside transformers on this machine's CPU: same weights, prompts and dtype, alternating in one run.

    python scripts/benchmark_cpu.py [--model smollm2-135m] [--repeats 5] [--output experiments/cpu]
    python scripts/benchmark_cpu.py --test        # few tokens, once; into results/test/cpu

Writes engine_cpu.csv, where a ratio above 1 means that ours is better, and environment.json.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tqdm import tqdm

from sarathi import LLM, SamplingParams
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.entrypoints.script import run_script
from sarathi.messages import CompletedStep, SchedulerOutput
from sarathi.metrics import MetricsStore
from sarathi.metrics.environment import environment
from sarathi.model_executor.loader.source import resolve_model

COLUMNS = ("model", "work", "backend", "batch", "context", "value", "unit", "reference", "ratio")
VOCAB_SIZE = 49_000  # token ids below it are words of the default model
PAIR = ("sdpa_vattn", "sdpa_paged_16")
SHORT = ("--repeats", "1", "--output", "results/test/cpu")


class Sizes(NamedTuple):
    """What a whole measurement takes. A shape: requests, prompt tokens of each, output tokens of each."""

    generate: tuple[tuple[int, ...], ...]  # prompt tokens of the requests of each batch
    new_tokens: int  # of each of those
    prefill: tuple[tuple[int, int, int], ...]
    decode: tuple[int, int, int]
    steps: tuple[tuple[int, int, int], ...]


MIXED_LENGTHS = (12, 20, 28, 40, 56, 72, 96, 120, 144, 180, 220, 260, 300, 360, 420, 500)
FULL = Sizes(
    generate=((64,), MIXED_LENGTHS), new_tokens=48, prefill=((4, 512, 1), (2, 2048, 1)), decode=(16, 16, 96),
    steps=((16, 32, 64), (64, 32, 64)),
)  # fmt: skip
SMALL = Sizes(
    generate=((8,), (6, 12)), new_tokens=4, prefill=((2, 32, 1),), decode=(2, 8, 4), steps=((2, 8, 4),)
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Prompts as token ids and how many tokens each request must produce."""

    prompts: list[list[int]]
    new_tokens: int

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=self.new_tokens, ignore_eos=True)


class Comparison(NamedTuple):
    """Median seconds of both, and the median of their ratios, pair by pair."""

    ours_s: float
    other_s: float
    ratio: float


class TransformersModel:
    """The independent implementation: its own loading of the same file, its own generate, left padding for batches."""

    def __init__(self, model: str) -> None:
        source = Path(resolve_model(model).path)
        place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        arguments = place if source.suffix == ".gguf" else {"pretrained_model_name_or_path": source}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=torch.float32, trust_remote_code=False
        ).eval()

    @torch.inference_mode()
    def generate(self, work: Work) -> None:
        longest = max(map(len, work.prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in work.prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in work.prompts])
        count = work.new_tokens
        self.model.generate(
            padded, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
        )


class ExecutorClock:
    """An executor that adds up the time inside the model; all else of a step is the engine's own."""

    def __init__(self, executor) -> None:
        self._executor = executor
        self.model_s = 0.0

    def __getattr__(self, name: str):
        return getattr(self._executor, name)

    def launch(self, output: SchedulerOutput) -> CompletedStep:
        result = self._executor.launch(output).result()
        self.model_s += result.model_s
        return CompletedStep(result)


class CallClock:
    """Another object, and the seconds that calls of it take."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.spent_s = 0.0

    def __getattr__(self, name: str) -> Callable[..., object]:
        return partial(self._timed, getattr(self._inner, name))

    def _timed(self, call: Callable[..., object], *arguments: object) -> object:
        start_s = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.spent_s += time.perf_counter() - start_s


@contextmanager
def engine(model: str, backend: str, max_num_seqs: int = 16) -> Iterator[LLM]:
    llm = LLM(model=model, attention_backend=backend, dtype="float32", max_num_seqs=max_num_seqs, chunk_size=512)
    try:
        yield llm
    finally:
        llm.close()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(ours: Callable[[], object], other: Callable[[], object], repeats: int, label: str) -> Comparison:
    """Both in turn, the first pair discarded."""
    pairs = [(seconds(ours), seconds(other)) for _ in tqdm(range(repeats + 1), desc=label)][1:]
    mine, theirs = zip(*pairs, strict=True)
    ratio = statistics.median(other_s / our_s for our_s, other_s in pairs)
    return Comparison(statistics.median(mine), statistics.median(theirs), ratio)


def random_prompts(lengths: tuple[int, ...], vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def generate(llm: LLM, work: Work) -> None:
    llm.generate(work.prompts, work.sampling_params(), use_tqdm=False)


def against_transformers(model: str, sizes: Sizes, repeats: int) -> Iterator[dict]:
    """Generation of one request and of a batch of mixed lengths."""
    reference = TransformersModel(model)
    vocab_size = reference.model.config.vocab_size
    with engine(model, PAIR[0]) as llm:
        for lengths in sizes.generate:
            work = Work(random_prompts(lengths, vocab_size), sizes.new_tokens)
            label = f"generate x{len(lengths)}"
            times = alternate(partial(generate, llm, work), partial(reference.generate, work), repeats, label)
            tokens, shape = len(lengths) * sizes.new_tokens, (len(lengths), max(lengths))
            yield row(
                model, "generate", PAIR[0], *shape, tokens / times.ours_s, "tokens/s", "transformers", times.ratio
            )
            yield row(model, "generate", "transformers", *shape, tokens / times.other_s, "tokens/s", "", "")


def equal_requests(count: int, prompt: int, output: int) -> Work:
    return Work(random_prompts((prompt,) * count, VOCAB_SIZE), output)


def against_paged(model: str, sizes: Sizes, repeats: int) -> Iterator[dict]:
    """The same engine on virtual and on paged memory: mostly prefill, then mostly decode."""
    works = [("prefill", equal_requests(*shape)) for shape in sizes.prefill]
    works.append(("decode", equal_requests(*sizes.decode)))
    with engine(model, PAIR[0]) as virtual, engine(model, PAIR[1]) as paged:
        for name, work in works:
            times = alternate(partial(generate, virtual, work), partial(generate, paged, work), repeats, name)
            tokens = sum(map(len, work.prompts)) if name == "prefill" else len(work.prompts) * work.new_tokens
            shape = (len(work.prompts), max(map(len, work.prompts)) + work.new_tokens)
            yield row(model, name, PAIR[0], *shape, tokens / times.ours_s, "tokens/s", PAIR[1], times.ratio)


def outside_the_model(model: str, batch: int, prompt: int, output: int) -> Iterator[dict]:
    """Shares of engine.step() that are not the model, and that are the metrics store, decode, medians over steps."""
    work = equal_requests(batch, prompt, output)
    with engine(model, PAIR[0], batch) as llm:
        executor, metrics = ExecutorClock(llm.engine.core.executor), CallClock(MetricsStore())
        measured = LLMEngine(EngineCore(llm.engine.core.scheduler, executor), llm.engine.tokenizer, metrics=metrics)
        for index, token_ids in enumerate(work.prompts):
            measured.add_request(str(index), token_ids, work.sampling_params())
        shares = []
        while measured.has_work:
            shares.append(_shares(measured, executor, metrics))
    names = ("time outside the model, metrics on", "time in the metrics store")
    for name, values in zip(names, zip(*shares, strict=True), strict=True):
        yield row(model, name, PAIR[0], batch, prompt + output, 100 * statistics.median(values), "% of a step", "", "")


def _shares(measured: LLMEngine, executor: ExecutorClock, metrics: CallClock) -> tuple[float, float]:
    """Of one step: outside the model, in the store."""
    model_s, metrics_s = executor.model_s, metrics.spent_s
    step_s = seconds(measured.step)
    return 1 - (executor.model_s - model_s) / step_s, (metrics.spent_s - metrics_s) / step_s


def row(*values: object) -> dict:
    return dict(zip(COLUMNS, values, strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("experiments/cpu"))
    parser.add_argument("--test", action="store_true", help="a short form: few tokens, once")
    options = parser.parse_args()
    return parser.parse_args([*SHORT, *sys.argv[1:]]) if options.test else options


def main() -> None:
    options = parse()
    sizes = SMALL if options.test else FULL
    rows = [
        *against_transformers(options.model, sizes, options.repeats),
        *against_paged(options.model, sizes, options.repeats),
        *(entry for shape in sizes.steps for entry in outside_the_model(options.model, *shape)),
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "engine_cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (options.output / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    for entry in rows:
        print(" ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in entry.values()))


if __name__ == "__main__":
    run_script(main)
