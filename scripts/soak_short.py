"""Send many short requests to one engine on the CPU, and print the process's memory over time.

    python scripts/soak_short.py                        # 60,000 requests to a tiny model, some minutes
    python scripts/soak_short.py --requests 2000

Exit code 1 if resident memory after all requests exceeds that after a sixth of them by more than 32 MiB.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sarathi import LLM, SamplingParams
from sarathi.entrypoints.script import run_script

GROWTH_BYTES = 32 * 2**20
BATCH = 100
SHOWN = (BATCH, 1000, *range(5000, 60_000, 5000))
VOCAB_SIZE = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60_000, help="in all, in batches of 100")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.seed)
        with LLM(folder, device="cpu", memory_bytes="64mb", max_num_seqs=32) as llm:
            after = dict(serve(llm, args.requests, random.Random(args.seed)))
    steady = min((count for count in after if count >= args.requests / 6), default=args.requests)
    growth = after[max(after)] - after[steady]
    print(f"{growth / 2**20:.1f} MiB more after {max(after)} requests than after {steady}")
    return int(growth > GROWTH_BYTES)


def write_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=2, **shape)).save_pretrained(folder)


def serve(llm: LLM, num_requests: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Serve requests; yields the number of requests so far and resident bytes."""
    began_s = time.monotonic()
    for count in range(BATCH, num_requests + 1, BATCH):
        prompts = [rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 40)) for _ in range(BATCH)]
        params = [SamplingParams(temperature=rng.choice([0, 1]), max_tokens=rng.randint(1, 6)) for _ in prompts]
        llm.generate(prompts, params, use_tqdm=False)
        resident = resident_bytes()
        yield count, resident
        if count in SHOWN or count + BATCH > num_requests:
            print(
                f"{count:6} requests, {time.monotonic() - began_s:5.0f} s: {resident / 2**20:.0f} MiB resident",
                flush=True,
            )


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    run_script(main)
