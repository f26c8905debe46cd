"""Compare two checkouts of this repository on one machine, alternating: revisions.csv, with a ratio for every record.

    PYTHONPATH=. python scripts/compare_revisions.py BEFORE AFTER --output DIR [--models llama-3-8b ...]
        [--backends fa_vattn ...] [--stages start,prefill,decode,requests] [--seconds 500]

BEFORE and AFTER are folders, each with its extension built (python setup.py build_ext --inplace). Both engines live on
the device at the same time, each with --memory-bytes of KV cache. Ratios above 1 mean that AFTER is better. The CSV
files are written after every record, and a run into the same folder continues them.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from sarathi.benchmark.config.program import add_stages
from sarathi.benchmark.engines.ours import find_model
from sarathi.benchmark.engines.sizes import FULL, SMALL, Sizes
from sarathi.benchmark.revisions.compare import Comparison, Samples, Task
from sarathi.entrypoints.script import run_script

STAGES = ("start", "prefill", "decode", "requests")
MODELS, BACKENDS = ("llama-3-8b", "yi-6b-200k"), ("fa_vattn", "fa_vattn_megacache")
SHORT = (
    "--models=tiny", "--backends=sdpa_vattn", "--device=cpu", "--max-model-len=1024", "--max-num-seqs=8",
    "--chunk-size=64", "--memory-bytes=64mb", "--rounds=2",
)  # fmt: skip
COMPARED = FULL._replace(prefill=(8192, 32768), decode=((1, 1024), (16, 1024), (64, 1024), (256, 1024)))


def make_tasks(sizes: Sizes, stages: list[str], max_model_len: int, seed: int) -> Iterator[Task]:
    """The tasks of a round, shortest first."""
    if "decode" in stages:
        for batch, context in sizes.decode:
            request = {"task": "decode", "batch": batch, "context": context, "steps": sizes.decode_steps}
            yield Task("decode", batch, context, "ms/step", request)
    if "prefill" in stages:
        for tokens in sizes.prefill:
            yield Task("prefill", 1, tokens, "s", {"task": "prefill", "tokens": tokens, "seconds": sizes.steady_s})
    if "requests" in stages:
        workloads = {
            "lengths uniform": sizes.uniform_requests(seed),
            "lengths lognormal": sizes.chat_requests(seed, max_model_len),
        }
        for name, lengths in workloads.items():
            longest = max(map(sum, lengths))
            request = {"task": "requests", "lengths": lengths}
            yield Task(f"requests, {name}", len(lengths), longest, "output tokens/s", request)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="folder of a checkout")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--models", nargs="+", default=["llama-3-8b", "yi-6b-200k"])
    parser.add_argument("--backends", nargs="+", default=["fa_vattn", "fa_vattn_megacache"])
    add_stages(parser, STAGES)
    parser.add_argument("--starts", type=int, default=2, help="processes of each side; the first one may compile")
    parser.add_argument("--rounds", type=int, default=3, help="most rounds over all tasks")
    parser.add_argument("--seconds", type=float, default=500.0, help="nothing starts after them; models share them")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N")
    parser.add_argument("--max-model-len", type=int, default=36864)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--memory-bytes", default="46gb", help="KV cache of each of the two engines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests' lengths")
    parser.add_argument("--output", type=Path, default=Path("results/revisions"), help="folder of the CSV files")
    parser.add_argument("--test", action="store_true", help="a short form on the CPU with a tiny model")
    options = parser.parse_args()
    return parser.parse_args([*SHORT, *sys.argv[1:]]) if options.test else options


def main() -> int:
    options = read_options()
    sizes = SMALL if options.test else COMPARED
    settings = {
        "load_format": "dummy", "chunk_size": options.chunk_size, "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs, "memory_bytes": options.memory_bytes, "device": options.device,
    }  # fmt: skip
    comparison = Comparison(
        checkouts={"before": options.before, "after": options.after},
        models={name: find_model(name) for name in options.models}, backends=options.backends, settings=settings,
        tasks=list(make_tasks(sizes, options.stages, options.max_model_len, options.seed)),
        starts=options.starts if "start" in options.stages else 1, rounds=options.rounds, seconds=options.seconds,
    )  # fmt: skip
    samples = Samples(options.output)
    failed = comparison.run(samples)
    print(samples.ratios().to_string(index=False, float_format="%.5g"))
    for line in failed:
        print(f"# failed: {line}")
    return int(bool(failed))


if __name__ == "__main__":
    run_script(main)
