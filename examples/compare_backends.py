"""An experiment from Python: the same requests on several backends, compared in a table and a plot.

    python examples/compare_backends.py [--model NAME] [--backends NAME ...] [--output FOLDER]

KNOBS below are those of the command line; the records of each run stay in memory and can be looked at in any way.
"""

import argparse
from pathlib import Path

from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.run.runner import BenchmarkRunner
from sarathi.entrypoints.script import run_script
from sarathi.metrics.environment import caption, environment
from sarathi.metrics.plots import plot_tails
from sarathi.metrics.report import summarize
from sarathi.metrics.tables import distributions

# Knobs of a run, as on the command line; sarathi/benchmark/config/default.yml lists them all.
KNOBS = {
    "load_format": "auto",
    "num_requests": 12,
    "length_provider": "uniform",
    "interval_provider": "poisson",
    "poisson_request_interval_generator.qps": 8,
    "uniform_request_length_generator.min_tokens": 40,
    "uniform_request_length_generator.max_tokens": 160,
    "uniform_request_length_generator.prefill_to_decode_ratio": 4,
    "max_model_len": 512,
    "kv_cache_bytes": "256mb",
}
BACKENDS = ["sdpa_vattn", "sdpa_vattn_megacache", "sdpa_paged_16"]
TBT = "decode_token_execution_plus_preemption_time"


def measure(backend: str, model: str):
    """The records of one run: every request, step and token."""
    words = [f"--{name}={value}" for name, value in KNOBS.items()]
    config = parse_options([*words, f"--attention_backend={backend}", f"--model.name={model}"])
    with BenchmarkRunner(config) as runner:
        return runner.run(runner.workload()).records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--output", type=Path, default=Path("results/compare"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    gaps = {}
    print(f"{'backend':24} {'tokens/s':>9} {'P50 TTFT ms':>12} {'P99 TBT ms':>11} {'peak KV MB':>11}")
    for backend in options.backends:
        records = measure(backend, options.model)
        summary = summarize(records)
        rate, metrics = summary["throughput"]["decode_tokens_per_s"], summary["metrics"]
        ttft_ms, tbt_ms = 1e3 * metrics["prefill_e2e_time"]["p50"], 1e3 * metrics[TBT]["p99"]
        peak_mb = summary["memory"]["peak_mapped_bytes"] / 2**20
        print(f"{backend:24} {rate:9.1f} {ttft_ms:12.1f} {tbt_ms:11.1f} {peak_mb:11.1f}")
        gaps[backend] = distributions(records)[TBT]
    plot_tails(options.output / "time_between_tokens.png", gaps, "time between tokens (s)", caption([environment()]))
    print(f"plot: {options.output / 'time_between_tokens.png'}")


if __name__ == "__main__":
    run_script(main)
