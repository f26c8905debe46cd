"""Measure pipeline bubbles with Sarathi's schedule and with vLLM's: pipeline.csv.

    OMP_NUM_THREADS=1 python scripts/benchmark_pipeline.py --pipeline-parallel-size 2 --output DIR

Prompts of different lengths arrive while others decode. vLLM's schedule alternates steps of whole prompts with steps of
decodes, and stages wait for each other; Sarathi's gives all steps the same number of tokens. A stage's bubble fraction
is 1 - (seconds it computed) / (seconds of the run). Waiting for input does not count as computing; it is measured only
on CPUs.
"""

import argparse
import random
import time

from sarathi import LLM, SamplingParams
from sarathi.benchmark.config.program import engine_parser, parse, positive
from sarathi.benchmark.records import Record, Table
from sarathi.entrypoints.script import run_script

SCHEDULES = ("sarathi", "vllm")


def measure(options: argparse.Namespace, table: Table, schedule: str) -> None:
    """Measure one engine: bubble fraction of each stage, and output tokens per second."""
    busy_s, run_s, num_tokens = serve(options, schedule)
    name = f"pipeline of {len(busy_s)}, {schedule}"
    for stage, busy in enumerate(busy_s):
        share = 1 - busy / run_s
        table.add(
            Record(options.model, f"bubbles of stage {stage}", name, options.requests, options.prompt, share, "share")
        )
    rate = num_tokens / run_s
    table.add(Record(options.model, "requests", name, options.requests, options.prompt, rate, "output tokens/s"))


def serve(options: argparse.Namespace, schedule: str) -> tuple[list[float], float, int]:
    """Compute seconds of each stage, seconds of the run, and output tokens."""
    rng = random.Random(options.seed)
    prompts = [[rng.randrange(100)] * rng.randint(options.prompt // 4, options.prompt) for _ in range(options.requests)]
    outputs = [rng.randint(options.outputs // 2, options.outputs) for _ in prompts]
    params = [SamplingParams(temperature=0.0, max_tokens=each, ignore_eos=True) for each in outputs]
    with LLM(
        options.model, load_format="dummy", device=options.device, attention_backend=options.backend,
        executor="multiproc", pipeline_parallel_size=options.pipeline_parallel_size, scheduler_type=schedule,
        chunk_size=options.chunk_size, max_num_seqs=options.max_num_seqs, max_model_len=options.max_model_len,
        memory_bytes=options.memory_bytes, prefix_caching=False,
    ) as llm:  # fmt: skip
        executor = llm.engine.core.executor  # type: ignore[attr-defined]
        llm.generate(prompts[:2], params[:2], use_tqdm=False)
        before_s, began_s = executor.busy_s(), time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        run_s, after_s = time.perf_counter() - began_s, executor.busy_s()
    return [after - before for before, after in zip(before_s, after_s, strict=True)], run_s, sum(outputs)


def main() -> int:
    parser = engine_parser(__doc__, "results/pipeline")
    parser.set_defaults(
        model="smollm2-135m", backend="sdpa_vattn", device="cpu", chunk_size=64, max_num_seqs=16, max_model_len=1024
    )
    parser.add_argument("--pipeline-parallel-size", type=positive, default=2, help="stages")
    parser.add_argument("--requests", type=positive, default=24)
    parser.add_argument("--prompt", type=positive, default=384, help="tokens of the longest prompt")
    parser.add_argument("--outputs", type=positive, default=32, help="most output tokens of a request")
    parser.add_argument("--rounds", type=positive, default=2, help="engines of each schedule, in turn")
    options = parse(parser, {"model": "smollm2-135m", "requests": 3, "prompt": 32, "outputs": 6, "rounds": 1})
    options.memory_bytes = options.memory_bytes or "256mb"
    table = Table(options.output / "pipeline.csv")
    for number in range(options.rounds):
        for schedule in SCHEDULES[:: -1 if number % 2 else 1]:
            table.attempts.run(schedule, lambda schedule=schedule: measure(options, table, schedule))
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
