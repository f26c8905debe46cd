"""`sarathi bench serve`: run a load, print and save its results. Exit code 1 if a request failed, 130 on ^C."""

from __future__ import annotations

import argparse
import math
import sys
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sarathi.benchmark.run.processes import held_signals
from sarathi.benchmark.serve import options, results
from sarathi.benchmark.serve.client import STREAMING, OutgoingRequest
from sarathi.benchmark.serve.dataset import NOTHING_PLANNED, Planned, make_requests
from sarathi.benchmark.serve.load import LoadOutcome, LoadPlan, run_load
from sarathi.benchmark.serve.vocabulary import Vocabulary, load_vocabulary
from sarathi.metrics.files import write_json

INTERRUPTED = 130


class Summary:
    """Computes the requested statistics of a load."""

    def __init__(self, args: argparse.Namespace) -> None:
        """ValueError if an option is invalid."""
        self._args = args
        self._metrics = options.parse_metrics(args.percentile_metrics)
        self._percentiles = options.parse_percentiles(args.metric_percentiles)
        self._goodput_ms = options.parse_goodput(args.goodput)
        self._metadata = options.parse_pairs(args.metadata, "--metadata")
        names = {**self._numbers(LoadOutcome(), NOTHING_PLANNED), **results.details(())}
        options.check_free("--metadata", self._metadata, names)

    def result(self, outcome: LoadOutcome, planned: Planned) -> dict[str, Any]:
        """The content of the JSON file, including --metadata."""
        return self._numbers(outcome, planned) | self._metadata

    def block(self, result: dict[str, Any]) -> str:
        """The printed report."""
        return results.block(result, self._metrics, self._percentiles)

    def _numbers(self, outcome: LoadOutcome, planned: Planned) -> dict[str, Any]:
        computed = results.compute(outcome.results, outcome.duration_s, self._goodput_ms)
        latencies_ms = results.latencies_ms(outcome.results)
        statistics = results.statistics(latencies_ms, self._metrics, self._percentiles)
        return _head(self._args, outcome, planned) | computed | statistics


def run(args: argparse.Namespace) -> int:
    """Send, print and save; returns the exit code. ValueError if an option is invalid."""
    summary = Summary(args)
    vocabulary = load_vocabulary(args.tokenizer) if args.tokenizer else None
    planned = make_requests(args, vocabulary)
    plan = _plan(args, planned.requests)
    _make_folder(args)
    with held_signals(threading.Event()):  # a signal ends the load, but not the writing
        outcome = run_load(plan)
        return _report(args, summary, outcome, planned, vocabulary)


def _report(
    args: argparse.Namespace, summary: Summary, outcome: LoadOutcome, planned: Planned, vocabulary: Vocabulary | None
) -> int:
    if vocabulary is not None:
        results.count_missing(outcome.results, vocabulary.count)
    result = summary.result(outcome, planned)
    print(summary.block(result))
    for error in sorted({each.error for each in outcome.results if each.error})[:5]:
        print(f"error: {error}", file=sys.stderr)
    if _saves(args):
        print(f"result: {_save(args, result, outcome)}")
    return INTERRUPTED if outcome.interrupted else int(result["failed"] > 0)


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of python -m sarathi.benchmark.serve.main."""
    parser = argparse.ArgumentParser(prog="bench serve", description="Load an OpenAI-compatible server and measure it.")
    options.add_options(parser)
    try:
        return run(parser.parse_args(words))
    except (ValueError, OSError) as error:
        print(f"bench serve: {error}", file=sys.stderr)
        return 1


def _plan(args: argparse.Namespace, requests: Sequence[OutgoingRequest]) -> LoadPlan:
    headers = options.parse_pairs(args.header, "--header")
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    sampling = {"top_p": args.top_p} if args.top_p is not None else {}
    sampling |= {"ignore_eos": True} if args.ignore_eos else {}
    options.check_free("--extra-body", args.extra_body, {**sampling, **STREAMING})
    return LoadPlan(
        base_url=options.base_url(args),
        path=args.endpoint or options.ENDPOINTS[args.backend],
        is_chat=args.backend == "openai-chat",
        model=args.model,
        body={"temperature": args.temperature, **args.extra_body, **sampling},
        headers=headers,
        requests=requests,
        max_concurrency=args.max_concurrency,
        num_warmups=args.num_warmups,
        timeout_s=args.request_timeout,
        show_progress=not args.disable_tqdm,
    )


def _head(args: argparse.Namespace, outcome: LoadOutcome, planned: Planned) -> dict[str, Any]:
    return {
        "ideal_cache_hit_rate": planned.reuse.ideal_rate,
        "cache_hit_rate": results.hit_rate(outcome.results),
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "model_id": outcome.model,
        "tokenizer_id": args.tokenizer,
        "num_prompts": args.num_prompts,
        "request_rate": args.request_rate if args.request_rate < math.inf else "inf",
        "planned_request_rate": results.planned_rate(planned.requests),
        "burstiness": args.burstiness if args.burstiness < math.inf else "inf",
        "max_concurrency": args.max_concurrency,
        "seed": args.seed,
    }


def _saves(args: argparse.Namespace) -> bool:
    return bool(args.save_result or args.save_detailed)


def _make_folder(args: argparse.Namespace) -> None:
    """Create the result folder before the load, so that a wrong path fails early."""
    if _saves(args):
        (Path(args.result_dir) / (args.result_filename or "name")).parent.mkdir(parents=True, exist_ok=True)


def _save(args: argparse.Namespace, result: dict[str, Any], outcome: LoadOutcome) -> Path:
    model = Path(result["model_id"]).name
    name = args.result_filename or f"{args.backend}-{result['request_rate']}qps-{model}-{result['date']}.json"
    content = result | (results.details(outcome.results) if args.save_detailed else {})
    path = Path(args.result_dir) / name
    write_json(path, content)
    return path


if __name__ == "__main__":
    sys.exit(main())
