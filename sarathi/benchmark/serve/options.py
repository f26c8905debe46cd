"""Options of `sarathi bench serve`, named as in `vllm bench serve`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Container, Iterable, Sequence
from typing import Any

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
METRICS = ("ttft", "tpot", "itl", "e2el", "scheduled_ttft", "scheduled_e2el")
DATASETS = ("random", "prefix_repetition", "multi_turn", "sharegpt", "sonnet", "mooncake", "csv")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Server, load, data set, sampling and results."""
    _add_server(parser.add_argument_group("server"))
    _add_load(parser.add_argument_group("load"))
    _add_dataset(parser.add_argument_group("data set"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_results(parser.add_argument_group("results"))


def base_url(args: argparse.Namespace) -> str:
    """The server's address without a trailing slash."""
    return (args.base_url or f"http://{args.host}:{args.port}").rstrip("/")


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--backend", choices=tuple(ENDPOINTS), default="openai", help="completions or chat completions")
    add("--base-url", help="address of the server; default: from --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--endpoint", help="path of the requests; default: the backend's")
    add("--model", help="model name; default: the first that the server lists")
    add("--api-key", help="sent as a bearer token")
    add("--header", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    add("--request-timeout", type=_positive, default=21600.0, metavar="S", help="seconds for one request")


def _add_load(group: Any) -> None:
    add = group.add_argument
    add("--num-prompts", type=_count, default=1000, help="requests")
    add("--request-rate", type=_positive, default=math.inf, help="requests a second; inf: all at once")
    add(
        "--burstiness",
        type=_positive,
        default=1.0,
        help="1: Poisson; below 1: bursty; above 1: more regular; inf: constant rate",
    )
    add("--max-concurrency", type=_count, help="maximum number of concurrent requests")
    add("--num-warmups", type=_natural, default=0, help="number of warm-up requests (copies of the first request)")
    add("--seed", type=_natural, default=0, help="seed of requests and send times")
    add("--disable-tqdm", action="store_true", help="no progress bar")


def _add_dataset(group: Any) -> None:
    add = group.add_argument
    add("--dataset-name", choices=DATASETS, default="random")
    times = "mooncake (Qwen-Bailian, too) and csv with times (Azure, BurstGPT) replay them if no rate is given"
    add("--dataset-path", help=f"file of the data set, .gz or not; {times}")
    add("--sonnet-input-len", type=_count, default=550, help="prompt tokens, about")
    add("--sonnet-output-len", type=_count, default=150, help="output tokens")
    add(
        "--sonnet-prefix-len",
        type=_natural,
        default=200,
        help="approximate number of prompt tokens that all requests share",
    )
    add("--sharegpt-output-len", type=_count, help="output tokens; default: length of the data set's answer")
    add("--disable-shuffle", action="store_true", help="keep ShareGPT's file order instead of shuffling")
    add("--random-input-len", type=_count, default=1024, help="prompt tokens")
    add("--random-output-len", type=_count, default=128, help="output tokens")
    add("--random-range-ratio", type=float, default=0.0, help="r: draw lengths from [1-r, 1+r] times these")
    add("--random-prefix-len", type=_natural, default=0, help="tokens of a prefix common to all prompts")
    add("--prefix-repetition-prefix-len", type=_natural, default=256, help="tokens of each group's common prefix")
    add("--prefix-repetition-suffix-len", type=_count, default=256, help="prompt tokens after the prefix")
    add("--prefix-repetition-num-prefixes", type=_count, default=10, help="groups")
    add("--prefix-repetition-output-len", type=_count, default=128, help="output tokens")
    add("--multi-turn-num-turns", type=_count, default=6, help="turns of a conversation, in a closed loop")
    add("--multi-turn-shared-len", type=_natural, default=0, help="tokens of a prefix common to all conversations")
    add("--multi-turn-user-len", type=_count, default=200, help="tokens of a question")
    add("--multi-turn-output-len", type=_count, default=150, help="tokens of an answer")
    add(
        "--multi-turn-think-time",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="delay between an answer and the next question",
    )
    exact = "the server's, a folder, hub id or smollm2-135m: prompts are text of exact lengths by it, and answers "
    exact += "are counted by it where the server tells no usage"
    add("--tokenizer", metavar="NAME", help=exact)
    ids = "without --tokenizer, prompts of completions are ids below it"
    add("--vocab-size", type=_count, default=32000, help=ids)


def _add_sampling(group: Any) -> None:
    add = group.add_argument
    add("--ignore-eos", action="store_true", help="generate the full number of output tokens")
    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float)
    add("--extra-body", type=_json_object, default={}, metavar="JSON", help="additional request fields")


def _add_results(group: Any) -> None:
    add = group.add_argument
    add("--percentile-metrics", default=",".join(METRICS), help=f"which of {','.join(METRICS)}")
    add("--metric-percentiles", default="99", help="percentiles, as 50,90,99")
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="latency targets for goodput")
    add("--save-result", action="store_true", help="write the result as JSON")
    add("--save-detailed", action="store_true", help="include each request's lengths, times and text")
    add("--result-dir", default=".", help="folder of the JSON file")
    add("--result-filename", help="file name; default: from backend, rate, model and time")
    add("--metadata", nargs="*", default=[], metavar="NAME=VALUE", help="additional keys of the JSON file")


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """Parse words such as "ttft:200" to metric -> milliseconds. ValueError for an invalid word."""
    targets = {}
    for word in words:
        name, _, value = word.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise ValueError(f"--goodput {word!r}: its metric must be ttft, tpot or e2el")
        try:
            targets[name] = _positive(value)
        except (ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"--goodput {word!r}: it must end in milliseconds, as ttft:200") from None
    return targets


def parse_pairs(words: Sequence[str], option: str) -> dict[str, str]:
    """Parse NAME=VALUE words to a dict."""
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"{option} {wrong[0]!r}: it must be NAME=VALUE")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def check_free(option: str, names: Iterable[str], taken: Container[str]) -> None:
    """ValueError if an option sets a name that the benchmark sets itself."""
    if wrong := [name for name in names if name in taken]:
        raise ValueError(f"{option} sets {wrong[0]!r}: remove it, the benchmark sets it itself")


def parse_metrics(text: str) -> list[str]:
    """Parse names of metrics; returns them in the order of METRICS."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := names - set(METRICS):
        raise ValueError(f"--percentile-metrics {text!r}: {unknown.pop()!r} is not among {', '.join(METRICS)}")
    return [name for name in METRICS if name in names]


def parse_percentiles(text: str) -> list[float]:
    """Parse percentiles from 0 to 100."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise ValueError(f"--metric-percentiles {text!r}: it must be numbers from 0 to 100, as 50,90,99")
    return values


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0, and finite")
    return value


def _count(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(low: int, text: str) -> int:
    value = int(text)
    if value < low:
        raise argparse.ArgumentTypeError(f"{text} must be at least {low}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be a JSON object, as {{"top_k": 5}}')
    return value
