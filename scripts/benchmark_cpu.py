"""Compare the engine with transformers on this machine's CPU: same weights, prompts and dtype, alternating in one run.

    python scripts/benchmark_cpu.py [--model smollm2-135m] [--repeats 5] [--output experiments/cpu]
    python scripts/benchmark_cpu.py --stages grammar --repeats 15 --output experiments/cpu/grammar
    python scripts/benchmark_cpu.py --test        # few tokens, once; into results/test/cpu

Writes engine_cpu.csv (ratios above 1: ours is better) and environment.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm

from sarathi import LLM, SamplingParams
from sarathi.benchmark.config.program import add_stages
from sarathi.benchmark.records import Record
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.entrypoints.script import run_script
from sarathi.messages import CompletedStep, SchedulerOutput
from sarathi.metrics import MetricsStore
from sarathi.metrics.environment import environment
from sarathi.model_executor.loader.source import resolve_model
from sarathi.structured_outputs import StructuredOutputsParams

VOCAB_SIZE = 49_000  # token ids below it are words of the default model
OURS, PAGED = "sdpa_vattn", "sdpa_paged_16"
STAGES = ("transformers", "paged", "steps", "grammar")
SHORT = ("--repeats", "1", "--output", "results/test/cpu")
SCHEMAS = {
    "strings of at most 9 characters": {"type": "string", "maxLength": 9},  # the dearest masks
    "objects": {
        "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": False,
    },
}  # of the items of a JSON array  # fmt: skip
Prompts = list[list[int]]
Generate = Callable[[Prompts, int], object]  # prompts, new tokens of each


class Sizes(NamedTuple):
    """The amount of work. A shape: requests, prompt tokens of each, output tokens of each."""

    generate: tuple[tuple[int, ...], ...]  # prompt tokens of the requests of each batch
    new_tokens: int  # of each of those
    prefill: tuple[tuple[int, int, int], ...]
    decode: tuple[int, int, int]
    steps: tuple[tuple[int, int, int], ...]
    grammar: tuple[int, int, int]


MIXED_LENGTHS = (12, 20, 28, 40, 56, 72, 96, 120, 144, 180, 220, 260, 300, 360, 420, 500)
FULL = Sizes(
    generate=((64,), MIXED_LENGTHS), new_tokens=48, prefill=((4, 512, 1), (2, 2048, 1)), decode=(16, 16, 96),
    steps=((16, 32, 64), (64, 32, 64)), grammar=(8, 32, 64),
)  # fmt: skip
SMALL = Sizes(((8,), (6, 12)), 4, ((2, 32, 1),), (2, 8, 4), ((2, 8, 4),), (2, 8, 4))


class TransformersModel:
    """The reference: transformers on the same checkpoint, with left padding for batches."""

    def __init__(self, model: str) -> None:
        source = Path(resolve_model(model).path)
        place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        arguments = place if source.suffix == ".gguf" else {"pretrained_model_name_or_path": source}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=torch.float32, trust_remote_code=False
        ).eval()

    @torch.inference_mode()
    def generate(self, prompts: Prompts, count: int) -> None:
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        lengths = {"min_new_tokens": count, "max_new_tokens": count}
        self.model.generate(padded, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)


class CallClock:
    """A proxy that sums the seconds spent in an object's methods."""

    def __init__(self, inner: object) -> None:
        self._inner, self.spent_s = inner, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._timed, found) if callable(found) else found

    def _timed(self, call: Callable[..., object], *arguments: object) -> object:
        start_s = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.spent_s += time.perf_counter() - start_s


class ExecutorClock(CallClock):
    """A proxy that sums an executor's time inside the model."""

    def launch(self, output: SchedulerOutput) -> CompletedStep:
        result = self._inner.launch(output).result()
        self.model_s += result.model_s
        return CompletedStep(result)

    model_s = 0.0


def engine(model: str, backend: str, max_num_seqs: int = 16) -> LLM:
    return LLM(
        model=model, attention_backend=backend, dtype="float32", max_num_seqs=max_num_seqs, chunk_size=512,
        prefix_caching=False,
    )  # fmt: skip


def greedy(new_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)


def generate(llm: LLM, prompts: Prompts, new_tokens: int) -> None:
    llm.generate(prompts, greedy(new_tokens), use_tqdm=False)


def seconds(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def random_prompts(lengths: tuple[int, ...], vocab_size: int = VOCAB_SIZE) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def alternate(ours: Generate, other: Generate, prompts: Prompts, new_tokens: int, repeats: int) -> tuple[float, ...]:
    """Alternate both, discarding the first pair; returns median seconds of ours and of the other, and median ratio."""
    runs = [partial(each, prompts, new_tokens) for each in (ours, other)]
    found = pd.DataFrame([map(seconds, runs) for _ in tqdm(range(repeats + 1))][1:], columns=["ours", "other"])
    return (*found.median(), (found.other / found.ours).median())


def against_transformers(model: str, sizes: Sizes, repeats: int) -> Iterator[Record]:
    """Compare one request, and a batch of mixed lengths, with transformers."""
    reference = TransformersModel(model)
    with engine(model, OURS) as llm:
        for lengths in sizes.generate:
            prompts = random_prompts(lengths, reference.model.config.vocab_size)
            ours = partial(generate, llm)
            ours_s, other_s, ratio = alternate(ours, reference.generate, prompts, sizes.new_tokens, repeats)
            tokens, shape = len(lengths) * sizes.new_tokens, (len(lengths), max(lengths))
            other = Record(model, "generate", "transformers", *shape, tokens / other_s, "tokens/s")
            yield replace(other, backend=OURS, value=tokens / ours_s, reference="transformers", ratio=ratio)
            yield other


def against_paged(model: str, sizes: Sizes, repeats: int) -> Iterator[Record]:
    """Compare virtual with paged memory: mostly prefill, then mostly decode."""
    works = [*(("prefill", shape) for shape in sizes.prefill), ("decode", sizes.decode)]
    with engine(model, OURS) as virtual, engine(model, PAGED) as paged:
        for name, (count, prompt, output) in works:
            runs = partial(generate, virtual), partial(generate, paged)
            ours_s, _, ratio = alternate(*runs, random_prompts((prompt,) * count), output, repeats)
            tokens = count * (prompt if name == "prefill" else output)
            yield Record(model, name, OURS, count, prompt + output, tokens / ours_s, "tokens/s", PAGED, ratio)


def outside_the_model(model: str, batch: int, prompt: int, output: int) -> Iterator[Record]:
    """Shares of engine.step() outside the model and in the metrics store: medians over decode steps."""
    with engine(model, OURS, batch) as llm:
        executor, metrics = ExecutorClock(llm.engine.core.executor), CallClock(MetricsStore())
        measured = LLMEngine(EngineCore(llm.engine.core.scheduler, executor), llm.engine.tokenizer, metrics=metrics)
        for index, token_ids in enumerate(random_prompts((prompt,) * batch)):
            measured.add_request(str(index), token_ids, greedy(output))
        shares = []
        while measured.has_work:
            model_s, metrics_s = executor.model_s, metrics.spent_s
            step_s = seconds(measured.step)
            shares.append((1 - (executor.model_s - model_s) / step_s, (metrics.spent_s - metrics_s) / step_s))
    names = ("time outside the model, metrics on", "time in the metrics store")
    for name, values in zip(names, zip(*shares, strict=True), strict=True):
        yield Record(model, name, OURS, batch, prompt + output, 100 * statistics.median(values), "% of a step")


def with_grammars(model: str, shape: tuple[int, int, int], repeats: int) -> Iterator[Record]:
    """Compare JSON-schema outputs with unconstrained ones of the same length and seeds."""
    batch, prompt, output = shape
    free = [SamplingParams(max_tokens=output, ignore_eos=True, seed=seed) for seed in range(batch)]
    with engine(model, OURS) as llm:
        for name, items in SCHEMAS.items():
            schema = StructuredOutputsParams(json={"type": "array", "items": items, "minItems": output})
            bound = [replace(each, ignore_eos=False, structured_outputs=schema) for each in free]
            runs = [partial(drawn, llm, params) for params in (bound, free)]
            bound_s, free_s, ratio = alternate(*runs, random_prompts((prompt,) * batch), output, repeats)
            tokens, work = batch * output, f"JSON array of {name}"
            other = Record(model, work, "without a grammar", batch, prompt + output, tokens / free_s, "tokens/s")
            yield replace(other, backend=OURS, value=tokens / bound_s, reference=other.backend, ratio=ratio)
            yield other


def drawn(llm: LLM, params: Sequence[SamplingParams], prompts: Prompts, new_tokens: int) -> None:
    """Sample outputs. RuntimeError if one is shorter than requested."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    if lengths := {len(each.outputs[0].token_ids) for each in outputs} - {new_tokens}:
        raise RuntimeError(f"outputs have {lengths} tokens and not {new_tokens}")


def measured(options: argparse.Namespace, sizes: Sizes) -> Iterator[Record]:
    """Records of the chosen stages."""
    model, repeats = options.model, options.repeats
    if "transformers" in options.stages:
        yield from against_transformers(model, sizes, repeats)
    if "paged" in options.stages:
        yield from against_paged(model, sizes, repeats)
    if "steps" in options.stages:
        for shape in sizes.steps:
            yield from outside_the_model(model, *shape)
    if "grammar" in options.stages:
        yield from with_grammars(model, sizes.grammar, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    add_stages(parser, STAGES)
    parser.add_argument("--output", type=Path, default=Path("experiments/cpu"))
    parser.add_argument("--test", action="store_true", help="a short form: few tokens, once")
    options = parser.parse_args()
    options = parser.parse_args([*SHORT, *sys.argv[1:]]) if options.test else options
    sizes = SMALL if options.test else FULL
    found = pd.DataFrame(measured(options, sizes))
    options.output.mkdir(parents=True, exist_ok=True)
    found.to_csv(options.output / "engine_cpu.csv", index=False)
    (options.output / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    print(found.to_string(index=False, header=False, float_format="%.3f"))


if __name__ == "__main__":
    run_script(main)
