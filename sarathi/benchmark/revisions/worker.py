"""Worker process of a comparison of two checkouts. Uses only the checkout's public API.

compare.py passes this file's text to `python -c` with the checkout as the working folder and on PYTHONPATH, so it
imports nothing but the standard library and `sarathi`'s LLM and SamplingParams: it must work on old revisions too.
The first line of stdin is the engine's settings as JSON, each further line one task; each is answered with a JSON line.
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 12
FIRST_ID, LAST_ID = 3, 900  # of random prompts: ids that every vocabulary has


class Worker:
    """One engine and the tasks on it; each task returns one number."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from sarathi import LLM, SamplingParams

        self._params = SamplingParams
        self._random = random.Random(0)
        self._llm: Any = LLM(**settings)

    def prompt(self, tokens: int) -> list[int]:
        return self._random.choices(range(FIRST_ID, LAST_ID), k=tokens)

    def serve(self, requests: Sequence[tuple[int, int]]) -> float:
        """Seconds for (prompt tokens, output tokens) requests that all arrive at once."""
        prompts = [self.prompt(tokens) for tokens, _ in requests]
        params = [self._sampling(tokens) for _, tokens in requests]
        start_s = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start_s
        got = [len(output.outputs[0].token_ids) for output in outputs]
        if got != [tokens for _, tokens in requests]:
            raise RuntimeError(f"requests asked for {[tokens for _, tokens in requests]} tokens and got {got}")
        return seconds

    def start(self) -> float:
        """Seconds from the start of this process to the first token of a prompt of 16 tokens."""
        self.serve([(16, 1)])
        return process_age_s()

    def warm_up(self, tokens: int) -> float:
        """Run several prompts in one step and decode; `tokens`: of the longest prompt."""
        return self.serve([(tokens, WARM_UP_TOKENS)] + [(16, WARM_UP_TOKENS)] * 7)

    def prefill(self, tokens: int, seconds: float) -> float:
        """Seconds of one prompt of `tokens` tokens and one output token: median of the later half of `seconds`."""
        end_s = time.perf_counter() + seconds
        samples = [self.serve([(tokens, 1)])]
        while time.perf_counter() < end_s:
            samples.append(self.serve([(tokens, 1)]))
        return statistics.median(samples[len(samples) // 2 :])

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Milliseconds of a decode step of `batch` requests, over `steps` steps in which all of them decode.

        No request grows beyond `context` tokens: where pages hold 1,024 tokens, 256 requests fit twice on one device.
        """
        early = 2 * WARM_UP_TOKENS + batch * context // 4096  # tokens of a request while others are still in prefill
        prompt = max(context - steps - early, 8)
        prompts = [self.prompt(prompt) for _ in range(batch)]
        stream = self._llm.stream_all(prompts, self._sampling(steps + early))
        counts = [0] * batch
        advance(stream, counts, WARM_UP_TOKENS)
        start_s, before = time.perf_counter(), sum(counts)
        advance(stream, counts, min(counts) + steps)
        seconds, tokens = time.perf_counter() - start_s, sum(counts) - before
        stream.close()
        return 1e3 * seconds * batch / tokens

    def requests(self, lengths: Sequence[tuple[int, int]]) -> float:
        """Output tokens a second over requests that all arrive at once."""
        return sum(tokens for _, tokens in lengths) / self.serve(lengths)

    def _sampling(self, tokens: int) -> Any:
        return self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def advance(stream: Iterator[tuple[int, Any]], counts: list[int], target: int) -> None:
    """Read the stream until every request has `target` tokens; counts: tokens so far, by number of the request."""
    missing = sum(count < target for count in counts)
    for number, _ in stream:
        counts[number] += 1
        missing -= counts[number] == target
        if not missing:
            return
    raise RuntimeError(f"the stream ended before every request had {target} tokens: {counts}")


def process_age_s() -> float:
    """Seconds since this process began, imports included."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def answer_tasks(lines: Iterator[str], reply: Callable[[object], None]) -> None:
    """Open the engine and run one task per line: {"task": name, parameters} -> {"value": ...} or {"error": ...}.

    The first reply has the start-up time to the first token, and the folder that `sarathi` was imported from.
    """
    worker = Worker(json.loads(next(lines)))
    reply({"value": worker.start(), "package": str(Path(sys.modules["sarathi"].__file__ or "").parent)})
    for line in lines:
        task = json.loads(line)
        try:
            reply({"value": getattr(worker, task.pop("task"))(**task)})
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def reply(value: object) -> None:
        print(json.dumps(value), file=replies, flush=True)

    answer_tasks(iter(sys.stdin.readline, ""), reply)


if __name__ == "__main__":
    main()
