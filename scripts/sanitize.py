"""Exercise mapping, growth, reclaim and reuse of slots on every backend, for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python scripts/sanitize.py --device cuda
    python scripts/sanitize.py --test        # the same on the CPU

The model has two layers of random weights in which a 2 MiB page holds 1,024 tokens. The cache has a few rows, so that
new requests reuse pages of finished ones. Checks output lengths, and the accounting after each backend.
"""

import argparse
import random
import time

from sarathi.benchmark.config.program import engine_parser, parse
from sarathi.benchmark.engines.ours import OurEngine, open_engine
from sarathi.entrypoints.script import run_script

MODEL = "two-wide-layers"
BACKENDS = (
    "fa_vattn", "fa_vattn_sync", "fa_vattn_megacache", "fa_vattn_megacache_sync", "fa3_vattn", "fi_vattn",
    "fi_vattn_sync", "fi_vattn_megacache", "fi_paged_16", "fa_paged_256", "sdpa_vattn", "sdpa_paged_16",
)  # fmt: skip
CPU_BACKENDS = ("sdpa_vattn", "sdpa_vattn_megacache_sync", "sdpa_paged_16")


def exercise(engine: OurEngine, seed: int) -> None:
    """Grow across a page boundary, abort a running request, and reuse pages of finished requests for a long prompt."""
    source = random.Random(seed)
    page = 1024

    def add(tokens: int, output: int) -> str:
        return engine.add(source.choices(range(3, engine.vocab_size - 3), k=tokens), output)

    due = {add(page - 12, 24): 24, add(17, 40): 40, add(source.randint(1, 300), 8): 8}
    aborted = add(500, 64)
    for _ in range(6):
        advance(engine, due)
    engine.abort([aborted])
    drain(engine, due)
    due = {add(2 * page + source.randint(1, 99), 4): 4, add(5, 30): 30, add(page // 2, 12): 12}
    drain(engine, due)
    if any(due.values()):
        raise RuntimeError(f"requests ended with tokens missing: {due}")


def advance(engine: OurEngine, due: dict[str, int]) -> None:
    for request_id, tokens in engine.step():
        if request_id in due:
            due[request_id] -= len(tokens)


def drain(engine: OurEngine, due: dict[str, int]) -> None:
    while engine.has_work:
        advance(engine, due)
    engine.check_integrity()


def run(options: argparse.Namespace, backend: str) -> str:
    """Run one backend; returns "done ...", or why it is skipped."""
    start_s = time.monotonic()
    try:
        engine = open_engine(options, backend)
    except ValueError as error:  # no such kernel here
        return f"left out: {error}"
    try:
        exercise(engine, options.seed)
    finally:
        engine.close()
    return f"done in {time.monotonic() - start_s:.1f} s"


def main() -> int:
    parser = engine_parser(__doc__, "results/sanitize")
    parser.set_defaults(
        model="two-wide-layers", max_model_len=4096, max_num_seqs=4, chunk_size=512, memory_bytes="48mb"
    )
    parser.add_argument("--backends", type=lambda text: text.split(","), default=list(BACKENDS))
    given = {"model": MODEL, "memory_bytes": "96mb", "max_model_len": 4096, "backends": ",".join(CPU_BACKENDS)}
    options = parse(parser, given)
    done = 0
    for backend in options.backends:
        outcome = run(options, backend)
        done += outcome.startswith("done")
        print(f"{backend:28} {outcome}", flush=True)
    return int(not done)


if __name__ == "__main__":
    run_script(main)
