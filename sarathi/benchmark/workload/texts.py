"""Text data sets: conversations (ShareGPT), and prompts from the lines of a poem (sonnet.txt)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.benchmark.workload.text_files import make_all, read_text

CountTokens = Callable[[str], int]
LEAST_TURN_TOKENS = 4  # a shorter question or answer is left out


class SonnetLengths(NamedTuple):
    """Tokens of prompts, outputs and the common prefix; defaults are those of vLLM's benchmark."""

    prompt: int = 550
    output: int = 150
    prefix: int = 200


SONNET_LENGTHS = SonnetLengths()


def read_sharegpt(
    path: Path, count_tokens: CountTokens | None, rng: np.random.Generator | None = None
) -> Iterator[RequestSpec]:
    """The first question and answer of each conversation, in file order or shuffled by `rng`.

    Skips conversations without both, or under 4 tokens. Counts tokens lazily: the usual file has 90,000 conversations.
    """
    count_tokens = _counter(path, count_tokens)
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{str(path)!r} cannot be parsed as JSON: it is nested too deeply") from None
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} holds a {type(entries).__name__}: it must hold a list of conversations")
    talks = make_all(path, entries, _turns)
    order = range(len(talks)) if rng is None else rng.permutation(len(talks))
    for turns in (talks[place] for place in order):
        if len(turns) == 2:
            prompt, output = (count_tokens(turn) for turn in turns)
            if min(prompt, output) >= LEAST_TURN_TOKENS:
                yield RequestSpec(0.0, prompt, output, turns[0])


def read_sonnet(
    path: Path, count_tokens: CountTokens | None, rng: np.random.Generator, lengths: SonnetLengths = SONNET_LENGTHS
) -> Iterator[RequestSpec]:
    """Endless prompts of about lengths.prompt tokens: a common prefix of the first lines, then random lines.

    ValueError if the file has no lines, or the prefix does not fit into a prompt.
    """
    count_tokens = _counter(path, count_tokens)
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{str(path)!r} holds no lines of text")
    if not 0 <= lengths.prefix <= lengths.prompt:
        raise ValueError(f"a prefix of {lengths.prefix} tokens: it must fit into prompts of {lengths.prompt}")
    a_line = sum(map(count_tokens, lines)) / len(lines)
    shared = lines[: round(lengths.prefix / a_line)]
    num_others = max(round(lengths.prompt / a_line) - len(shared), 0 if shared else 1)
    while True:
        text = "\n".join([*shared, *(lines[place] for place in rng.integers(0, len(lines), num_others))])
        yield RequestSpec(0.0, max(count_tokens(text), 1), lengths.output, text)


def _counter(path: Path, count_tokens: CountTokens | None) -> CountTokens:
    if count_tokens is None:
        raise ValueError(f"{str(path)!r} holds text: counting its tokens needs a model with a tokenizer")
    return count_tokens


def _turns(entry: Mapping[str, Any]) -> list[str]:
    turns = [turn["value"] for turn in entry.get("conversations") or entry.get("conversation") or ()][:2]
    if not all(isinstance(turn, str) for turn in turns):
        raise ValueError("a turn's value must be text")
    return turns
