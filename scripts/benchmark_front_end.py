"""Measure the server's front end alone, on an engine that computes nothing: front_end.csv.

    python scripts/benchmark_front_end.py --output DIR

--clients processes stream requests of 32 prompt tokens and 512 output tokens. Records requests and output tokens per
second, and per CPU second of the API process, whose limit is one core. For comparison: vLLM's front end in Python, with
several processes on a larger machine, reaches 807 requests/s and 413,000 tokens/s.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from sarathi.benchmark.config.program import positive
from sarathi.benchmark.engines import servers
from sarathi.benchmark.records import Record, Table
from sarathi.benchmark.serve.client import OutgoingRequest
from sarathi.benchmark.serve.load import LoadPlan, run_load
from sarathi.entrypoints.script import run_script

PROMPT_TOKENS = 32
_RUN = "from sarathi.benchmark.engines.instant import main; main()"


def send(url: str, count: int, output_tokens: int, concurrency: int) -> int:
    """Stream `count` answers with `concurrency` at a time; returns the number of output tokens."""
    requests = [OutgoingRequest(0.0, list(range(300, 300 + PROMPT_TOKENS)), PROMPT_TOKENS, output_tokens)] * count
    body = {"temperature": 0.0, "ignore_eos": True}
    plan = LoadPlan(
        url, "/v1/completions", False, servers.NAME, body, {}, requests, max_concurrency=concurrency,
        show_progress=False,
    )  # fmt: skip
    results = run_load(plan).results
    if errors := {each.error for each in results if each.error}:
        raise RuntimeError(f"requests failed: {errors}")
    return sum(each.output_tokens for each in results)


def processor_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=positive, default=2, help="processes that send")
    parser.add_argument("--requests", type=positive, default=256, help="of each client")
    parser.add_argument("--output-tokens", type=positive, default=512)
    parser.add_argument("--concurrency", type=positive, default=64, help="requests of a client at the same time")
    parser.add_argument("--output", type=Path, default=Path("results/front_end"))
    return parser.parse_args()


def measure(options: argparse.Namespace) -> tuple[int, float, float]:
    """Output tokens, seconds, and the server's CPU seconds."""
    folder = servers.save_model("llama-3-8b", 8192, Path(tempfile.mkdtemp(prefix="sarathi-model-")))
    port = servers.free_port()
    words = (sys.executable, "-c", _RUN, str(folder), str(port))
    command, url = servers.ServerCommand("sarathi", words), f"http://127.0.0.1:{port}"
    log, clients = options.output / "front_end.log", range(options.clients)
    with servers.running(command, url, log, 120) as started, ProcessPoolExecutor(options.clients) as pool:
        list(pool.map(partial(send, url, 4, 8), [4 for _ in clients]))  # warm-up
        start_s, start_cpu_s = time.perf_counter(), processor_s(started.pid)
        sending = partial(send, url, options.requests, options.output_tokens)
        tokens = sum(pool.map(sending, [options.concurrency for _ in clients]))
        return tokens, time.perf_counter() - start_s, processor_s(started.pid) - start_cpu_s


def main() -> int:
    """Measure; returns the exit code."""
    options = read_options()
    table = Table(options.output / "front_end.csv")
    tokens, elapsed_s, cpu_s = measure(options)
    num_requests = options.clients * options.requests
    for work, value, unit in (
        ("streams", num_requests / elapsed_s, "requests/s"), ("streams", tokens / elapsed_s, "output tokens/s"),
        ("streams, a second of its core", num_requests / cpu_s, "requests/s"),
        ("streams, a second of its core", tokens / cpu_s, "output tokens/s"),
    ):  # fmt: skip
        table.add(Record("no model", work, "sarathi", num_requests, options.output_tokens, value, unit))
    return 0


if __name__ == "__main__":
    run_script(main)
