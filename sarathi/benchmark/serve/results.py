"""Statistics and report of a load, with the keys and layout of `vllm bench serve`.

ttft: time to first token. tpot: (e2el - ttft) / (n - 1), for answers of two or more tokens. itl: gaps between chunks.
e2el: time to the last token. These start when a request is sent; scheduled_ttft and scheduled_e2el start at its
scheduled time and include the wait in the client's queue (--max-concurrency). Goodput: requests per second that meet
every target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sarathi.benchmark.serve.client import OutgoingRequest, RequestResult

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
    "scheduled_ttft": "Time to First Token from Schedule",
    "scheduled_e2el": "End-to-end Latency from Schedule",
}
WIDTH = 50
HEAD = (
    ("Successful requests:", "completed"),
    ("Failed requests:", "failed"),
    ("Maximum request concurrency:", "max_concurrency"),
    ("Request rate configured (RPS):", "request_rate"),
    ("Request rate planned (RPS):", "planned_request_rate"),
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_token_throughput"),
    ("Cached share of prompt tokens:", "cache_hit_rate"),
    ("... with a cache without limits:", "ideal_cache_hit_rate"),
)


def compute(results: Sequence[RequestResult], duration_s: float, goodput_ms: Mapping[str, float]) -> dict[str, Any]:
    """Counts and rates. Failed requests count only in `failed`."""
    good = [result for result in results if not result.error]
    input_tokens, output_tokens = sum(each.prompt_tokens for each in good), sum(each.output_tokens for each in good)
    duration = max(duration_s, 1e-9)
    met = sum(all(_value_ms(each, name) <= limit for name, limit in goodput_ms.items()) for each in good)
    return {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "request_goodput": met / duration if goodput_ms else None,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
        "max_output_tokens_per_s": peak_output_rate(good),
        "max_concurrent_requests": peak_concurrency(good),
    }


def latencies_ms(results: Sequence[RequestResult]) -> dict[str, list[float]]:
    """All values of each metric, over successful requests."""
    good = [result for result in results if not result.error]
    return {
        "ttft": [1e3 * result.ttft_s for result in good],
        "tpot": [1e3 * tpot for result in good if (tpot := tpot_s(result)) is not None],
        "itl": [1e3 * gap for result in good for gap in result.itls_s],
        "e2el": [1e3 * result.latency_s for result in good],
        "scheduled_ttft": [1e3 * (result.queued_s + result.ttft_s) for result in good],
        "scheduled_e2el": [1e3 * (result.queued_s + result.latency_s) for result in good],
    }


def statistics(
    values: Mapping[str, Sequence[float]], metrics: Sequence[str], percentiles: Sequence[float]
) -> dict[str, Any]:
    """mean_ttft_ms, median_ttft_ms, std_ttft_ms, p99_ttft_ms and so on; 0 without samples, as in vLLM."""
    found: dict[str, Any] = {}
    for name in metrics:
        data = np.asarray(values[name] if values[name] else [0.0])
        numbers = {"mean": data.mean(), "median": np.median(data), "std": data.std()}
        numbers |= {f"p{p:g}": np.percentile(data, p) for p in percentiles}
        found |= {f"{key}_{name}_ms": float(value) for key, value in numbers.items()}
    return found


def details(results: Sequence[RequestResult]) -> dict[str, Any]:
    """Lists with one entry per request, in send order."""
    ordered = sorted(results, key=lambda result: result.sent_at_s)
    return {
        "input_lens": [result.prompt_tokens for result in ordered],
        "output_lens": [result.output_tokens for result in ordered],
        "queued": [result.queued_s for result in ordered],
        "ttfts": [result.ttft_s if result.chunk_times_s else None for result in ordered],
        "itls": [result.itls_s for result in ordered],
        "generated_texts": [result.text for result in ordered],
        "errors": [result.error for result in ordered],
    }


def count_missing(results: Sequence[RequestResult], count_tokens: Callable[[str], int]) -> None:
    """Count the tokens of answers without reported usage: a chunk may have several."""
    for result in results:
        if not result.is_counted and not result.error:
            result.output_tokens = max(count_tokens(result.text), 1)


def hit_rate(results: Sequence[RequestResult]) -> float | None:
    """Fraction of prompt tokens that were cached; None if the server does not report it."""
    good = [result for result in results if not result.error]
    cached, total = sum(result.cached_tokens for result in good), sum(result.prompt_tokens for result in good)
    return cached / total if cached else None


def planned_rate(requests: Sequence[OutgoingRequest]) -> float | None:
    """Scheduled requests per second, from the first to the last; None if all are sent at once."""
    firsts: dict[int, OutgoingRequest] = {}  # of conversations: later turns wait for answers
    for request in requests:
        firsts.setdefault(id(request) if request.conversation is None else ~request.conversation, request)
    times = [request.send_at_s for request in firsts.values()]
    return (len(times) - 1) / (max(times) - min(times)) if times and max(times) > min(times) else None


def tpot_s(result: RequestResult) -> float | None:
    if result.output_tokens < 2:
        return None
    return (result.latency_s - result.ttft_s) / (result.output_tokens - 1)


def peak_output_rate(results: Sequence[RequestResult]) -> float:
    """Maximum tokens in any second since the first request. A request's tokens are spread evenly over its chunks."""
    if not results:
        return 0.0
    origin_s = min(result.sent_at_s for result in results)
    seconds = [int(at_s - origin_s) for result in results for at_s in result.chunk_times_s]
    tokens = [each.output_tokens / len(each.chunk_times_s) for each in results for _ in each.chunk_times_s]
    return float(np.bincount(seconds, tokens).max(initial=0))


def peak_concurrency(results: Sequence[RequestResult]) -> int:
    """Maximum number of concurrent requests; one that ends when another starts does not overlap it."""
    edges = [(result.sent_at_s, 1) for result in results] + [(result.ended_at_s, -1) for result in results]
    return int(np.cumsum([change for _, change in sorted(edges)], dtype=int).max(initial=0))


def block(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The printed report."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines += [_line(title, result[key]) for title, key in HEAD if result.get(key) is not None]
    keys = [("Mean", "mean"), ("Median", "median"), *((f"P{p:g}", f"p{p:g}") for p in percentiles)]
    for name in metrics:
        lines.append(f"{TITLES[name]:-^{WIDTH}}")
        lines += [_line(f"{word} {name.upper()} (ms):", result[f"{key}_{name}_ms"]) for word, key in keys]
    return "\n".join([*lines, "=" * WIDTH])


def _line(title: str, value: Any) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{title:<40}{shown:<10}"


def _value_ms(result: RequestResult, name: str) -> float:
    """A metric in ms. tpot of a one-token answer is undefined and meets any target."""
    seconds = {"ttft": result.ttft_s, "tpot": tpot_s(result) or 0.0, "e2el": result.latency_s}
    return 1e3 * seconds[name]
