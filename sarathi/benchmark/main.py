"""python -m sarathi.benchmark.main [--config FILE] [--knob value ...]: run one benchmark, write and print its results.

Exit codes: 0 completed; 1 error; 2 some requests were refused, or the time limit was reached; 130 ended by ^C, SIGTERM
or SIGHUP, with partial results written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sarathi.benchmark.config.document import print_help
from sarathi.benchmark.config.options import parse_options, start_logging
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.replicas.base import ReplicaError
from sarathi.benchmark.replicas.run import run_all
from sarathi.benchmark.results import describe_run, in_own_folder, send_results, write_results
from sarathi.benchmark.run.outcome import COMPLETED, INTERRUPTED, RunOutcome
from sarathi.benchmark.run.processes import ended_by_signals
from sarathi.metrics.wandb_log import WandbError

EXIT_ERROR, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 2, 130
HELP = """Run a workload on an engine in this process and write the results to output_dir.

usage: sarathi bench run [--config FILE] [--knob VALUE ...]

    sarathi bench run --num_requests 16 --max_model_len 2048 --length_provider fixed \\
        --fixed_request_length_generator.prefill_tokens 512 --fixed_request_length_generator.decode_tokens 64
    sarathi bench run --config run.yml --output_dir results/a
    sarathi bench run --model.name ./folder --load_format auto --request_generator.provider trace \\
        --trace_request_generator.trace_file AzureLLMInferenceTrace_conv.csv --num_requests 100

The default workload is vAttention's: 64 prompts of 8,192 to 32,768 tokens. It needs a model with such a context.
--help-knobs lists every knob with its default; sarathi/benchmark/README.md explains them.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    words = sys.argv[1:] if words is None else words
    if print_help(words, HELP):
        return 0
    return run_configs(lambda: [in_own_folder(parse_options(words))])


def run_configs(read: Callable[[], Sequence[BenchmarkConfig]]) -> int:
    """Run configurations that differ only in their workload, one after another; returns the highest exit code.

    ^C, SIGTERM and SIGHUP end all of them.
    """
    code = 0
    try:
        configs = read()
        start_logging(configs[0])
        with ended_by_signals():
            for config, outcomes in zip(configs, run_all(configs), strict=True):
                code = max(code, _finish(config, outcomes))
                if code == EXIT_INTERRUPTED:
                    break
    except KeyboardInterrupt:
        print("benchmark: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, ReplicaError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return EXIT_ERROR
    return code


def _finish(config: BenchmarkConfig, outcomes: Sequence[RunOutcome]) -> int:
    """Write, print and upload the result of one run; returns its exit code. A failed upload is not an exception."""
    summary = write_results(config, outcomes)
    print(f"{describe_run(summary)}\nresults: {config.output_dir}", flush=True)
    try:
        with ended_by_signals():  # ^C ends an upload at once: the files are written
            send_results(config, summary)
    except WandbError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return _exit_code(summary) or EXIT_ERROR
    return _exit_code(summary)


def _exit_code(summary: Mapping[str, Any]) -> int:
    if summary["ended"] == INTERRUPTED:
        return EXIT_INTERRUPTED
    return 0 if summary["ended"] == COMPLETED and not summary["refused"] else EXIT_INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())
