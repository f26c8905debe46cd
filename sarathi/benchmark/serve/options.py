"""Options of `sarathi bench serve`, by the names that `vllm bench serve` has."""

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
    """The server's address without a slash at its end."""
    return (args.base_url or f"http://{args.host}:{args.port}").rstrip("/")


def _add_server(group: Any) -> None:
    add = group.add_argument
    add("--backend", choices=tuple(ENDPOINTS), default="openai", help="completions or chat completions")
    add("--base-url", help="address of the server; default: from --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--endpoint", help="path of the requests; default: the backend's usual one")
    add("--model", help="model to ask for; default: the first that the server lists")
    add("--api-key", help="sent as a bearer token")
    add("--header", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    add("--request-timeout", type=_positive, default=21600.0, metavar="S", help="seconds for one request")


def _add_load(group: Any) -> None:
    add = group.add_argument
    add("--num-prompts", type=_count, default=1000, help="requests")
    add("--request-rate", type=_positive, default=math.inf, help="requests a second; inf: all at once")
    add("--burstiness", type=_positive, default=1.0, help="1: Poisson; less: bursts; more: even; inf: wholly even")
    add("--max-concurrency", type=_count, help="requests under way at the same time, at most")
    add("--num-warmups", type=_natural, default=0, help="how often the first request is sent before")
    add("--seed", type=_natural, default=0, help="the same seed: the same requests at the same times")
    add("--disable-tqdm", action="store_true", help="no progress bar")


def _add_dataset(group: Any) -> None:
    add = group.add_argument
    add("--dataset-name", choices=DATASETS, default="random")
    times = "mooncake (Qwen-Bailian, too) and csv with times (Azure, BurstGPT) replay them if no rate is given"
    add("--dataset-path", help=f"file of the data set, .gz or not; {times}")
    add("--sonnet-input-len", type=_count, default=550, help="prompt tokens, about")
    add("--sonnet-output-len", type=_count, default=150, help="output tokens")
    add("--sonnet-prefix-len", type=_natural, default=200, help="prompt tokens that all share, about")
    add("--sharegpt-output-len", type=_count, help="output tokens; default: as many as the answer has")
    add("--disable-shuffle", action="store_true", help="ShareGPT in the file's order, not the seed's")
    add("--random-input-len", type=_count, default=1024, help="prompt tokens")
    add("--random-output-len", type=_count, default=128, help="output tokens")
    add("--random-range-ratio", type=float, default=0.0, help="r: lengths from [1-r, 1+r] times these")
    add("--random-prefix-len", type=_natural, default=0, help="tokens that all prompts begin with")
    add("--prefix-repetition-prefix-len", type=_natural, default=256, help="prompt tokens that a group shares")
    add("--prefix-repetition-suffix-len", type=_count, default=256, help="prompt tokens behind them")
    add("--prefix-repetition-num-prefixes", type=_count, default=10, help="groups")
    add("--prefix-repetition-output-len", type=_count, default=128, help="output tokens")
    add("--multi-turn-num-turns", type=_count, default=6, help="questions of a conversation, in a closed loop")
    add("--multi-turn-shared-len", type=_natural, default=0, help="tokens that all conversations begin with")
    add("--multi-turn-user-len", type=_count, default=200, help="tokens of a question")
    add("--multi-turn-output-len", type=_count, default=150, help="tokens of an answer")
    add("--multi-turn-think-time", type=_seconds, default=0.0, metavar="S", help="from an answer to the next question")
    exact = "the server's, a folder, hub id or smollm2-135m: prompts are text of exact lengths by it, and answers "
    exact += "are counted by it where the server tells no usage"
    add("--tokenizer", metavar="NAME", help=exact)
    ids = "without --tokenizer, prompts of completions are ids below it"
    add("--vocab-size", type=_count, default=32000, help=ids)


def _add_sampling(group: Any) -> None:
    add = group.add_argument
    add("--ignore-eos", action="store_true", help="every answer has its full length")
    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float)
    add("--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of a request")


def _add_results(group: Any) -> None:
    add = group.add_argument
    add("--percentile-metrics", default=",".join(METRICS), help=f"which of {','.join(METRICS)}")
    add("--metric-percentiles", default="99", help="percentiles, as 50,90,99")
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="targets a good request meets")
    add("--save-result", action="store_true", help="write the result as JSON")
    add("--save-detailed", action="store_true", help="with each request's lengths, times and text")
    add("--result-dir", default=".", help="folder of the JSON file")
    add("--result-filename", help="its name; default: from backend, rate, model and time")
    add("--metadata", nargs="*", default=[], metavar="NAME=VALUE", help="more keys of the JSON file")


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """Metric -> milliseconds of "ttft:200"-like words; ValueError names what is wrong."""
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
    """NAME=VALUE words as a dict."""
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"{option} {wrong[0]!r}: it must be NAME=VALUE")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def check_free(option: str, names: Iterable[str], taken: Container[str]) -> None:
    """ValueError where an option gives a name that the benchmark sets itself, and would be overruled."""
    if wrong := [name for name in names if name in taken]:
        raise ValueError(f"{option} sets {wrong[0]!r}: it must leave that out, for the benchmark sets it itself")


def parse_metrics(text: str) -> list[str]:
    """Names of metrics, in the usual order."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := names - set(METRICS):
        raise ValueError(f"--percentile-metrics {text!r}: {unknown.pop()!r} is not among {', '.join(METRICS)}")
    return [name for name in METRICS if name in names]


def parse_percentiles(text: str) -> list[float]:
    """Percentiles from 0 to 100."""
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
