"""`sarathi generate`: completes prompts from arguments, a file or standard input."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sarathi.engine.input_processor import Prompt
from sarathi.engine.outputs import RequestOutput
from sarathi.entrypoints.console import OrderedPrinter
from sarathi.entrypoints.llm import LLM
from sarathi.entrypoints.options import config_from, sampling_from


def run(args: argparse.Namespace) -> int:
    """Complete all prompts; returns 0."""
    params, config = sampling_from(args), config_from(args)  # report errors before loading the model
    prompts = _read_prompts(args)
    with LLM.from_config(config) as llm:
        inputs: list[Prompt] = [_as_chat(llm, prompt) for prompt in prompts] if args.chat else prompts
        show = _JsonLines(prompts) if args.json else OrderedPrinter(_header(prompts))
        for number, output in llm.stream_all(inputs, params):
            show.take(number, output)
    return 0


def _read_prompts(args: argparse.Namespace) -> list[Prompt]:
    prompts: list[Prompt] = list(args.prompt)
    if args.prompt_token_ids is not None:
        prompts.append(args.prompt_token_ids)
    if args.prompt_file is not None:
        prompts += _lines(args.prompt_file)
    return prompts or [sys.stdin.read()]


def _lines(name: str) -> list[str]:
    text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {name} contains no prompt: write one per line")
    return lines


def _as_chat(llm: LLM, prompt: Prompt) -> Prompt:
    return llm.encode_chat([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt


def _header(prompts: Sequence[Prompt]) -> Callable[[int], str]:
    if len(prompts) == 1:
        return lambda number: ""
    return lambda number: f"--- {prompts[number]}\n"


class _JsonLines:
    """Prints one JSON object per prompt, in order of completion."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def take(self, number: int, output: RequestOutput) -> None:
        if output.finished:
            print(json.dumps(self._object(number, output), ensure_ascii=False, allow_nan=False), flush=True)

    def _object(self, number: int, output: RequestOutput) -> dict[str, Any]:
        shown = output.to_dict()
        head = {"index": number, "prompt": self._prompts[number], "prompt_tokens": len(shown["prompt_token_ids"])}
        return head | {name: shown[name] for name in ("outputs", "metrics", "prompt_logprobs") if name in shown}
