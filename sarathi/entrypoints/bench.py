"""`sarathi bench run | capacity | serve`: dispatch to the benchmark commands."""

from __future__ import annotations

import argparse
from typing import Any

KINDS = {
    "run": "run a workload on an engine in this process and record every request and step",
    "capacity": "find the highest request rate at which an engine in this process meets latency targets",
}
SERVE_EXAMPLES = (
    "sarathi bench serve --base-url http://127.0.0.1:8000 --request-rate 4 --num-prompts 100",
    "sarathi bench serve --port 8000 --dataset-name sharegpt --dataset-path ShareGPT.json --max-concurrency 16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three subcommands. run and capacity accept benchmark knobs as --name value."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    no_prefix = "\0"  # argparse must not parse the options of the command
    for name, help_text in KINDS.items():
        kind = kinds.add_parser(name, help=help_text, add_help=False, prefix_chars=no_prefix)
        kind.add_argument("words", nargs=argparse.REMAINDER, metavar="--knob value")
    _add_serve(kinds)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns its exit code."""
    if args.kind == "serve":
        from sarathi.benchmark.serve.main import run as run_serve

        return run_serve(args)
    if args.kind == "capacity":
        from sarathi.benchmark.capacity.main import main as search

        return search(args.words)
    from sarathi.benchmark.main import main as run_benchmark

    return run_benchmark(args.words)


def _add_serve(kinds: Any) -> None:
    from sarathi.benchmark.serve.options import add_options

    what = "send requests to a running server and measure its responses, like `vllm bench serve`"
    more = f"{what}. It starts no server and no engine; any server with OpenAI's API works."
    serve = kinds.add_parser("serve", help=what, description=more, examples=SERVE_EXAMPLES)
    add_options(serve)
