"""Measure the overhead of a step without computation: message to all ranks, votes and reply; ranks.csv.

    python scripts/benchmark_ranks.py --output DIR

Steps have no chunks but name requests unknown to the ranks: their messages are as long as those of decode steps. For
comparison, also measures a Ray actor call with the same message and reply.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from sarathi.benchmark.config.program import positive
from sarathi.benchmark.records import Record, Table
from sarathi.config.load import make_config
from sarathi.entrypoints.script import run_script
from sarathi.executor.factory import create_executor
from sarathi.messages import SchedulerOutput

SHAPE = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
"num_hidden_layers": 2, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 256,
"max_position_embeddings": 64, "rms_norm_eps": 1e-5}"""
WARM_UP = 50


class Echo:
    """Replies like a rank."""

    def step(self, out: SchedulerOutput) -> int:
        return out.step_id


def median_us(step: Callable[[int], object], count: int) -> float:
    times = []
    for number in range(WARM_UP + count):
        began_s = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began_s)
    return 1e6 * median(times[WARM_UP:])


def measure(table: Table, folder: str, executor_name: str, ranks: int, batch: int, steps: int) -> None:
    config = make_config(
        model=folder, load_format="dummy", device="cpu", executor=executor_name, tensor_parallel_size=ranks,
        memory_bytes=2**22, max_num_seqs=4,
    )  # fmt: skip
    executor = create_executor(config)
    ids = tuple(f"request-{number}" for number in range(batch))
    used = median_us(lambda number: executor.launch(SchedulerOutput(number, finished=ids)).result(), steps)
    executor.shutdown()
    table.add(Record("tiny", "step without work", f"{executor_name}, {ranks} ranks", batch, 0, used, "us"))


def measure_calls(table: Table, batch: int, steps: int) -> None:
    import ray

    actor = ray.remote(Echo).options(num_cpus=0).remote()
    ids = tuple(f"request-{number}" for number in range(batch))
    used = median_us(lambda number: ray.get(actor.step.remote(SchedulerOutput(number, finished=ids))), steps)
    ray.kill(actor)
    table.add(Record("tiny", "step without work", "a Ray call, 1 actor", batch, 0, used, "us"))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 256], help="requests that a message names")
    parser.add_argument("--executors", nargs="+", choices=("multiproc", "ray"), default=["multiproc", "ray"])
    parser.add_argument("--steps", type=positive, default=500)
    parser.add_argument("--output", type=Path, default=Path("results/ranks"))
    return parser.parse_args()


def main() -> int:
    options = read_options()
    table = Table(options.output / "ranks.csv")
    if "ray" in options.executors:
        import ray

        ray.init(num_cpus=max(options.ranks), include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(SHAPE)
        for batch in options.batches:
            for name in options.executors:
                for ranks in options.ranks:
                    measure(table, folder, name, ranks, batch, options.steps)
            if "ray" in options.executors:
                measure_calls(table, batch, options.steps)
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
