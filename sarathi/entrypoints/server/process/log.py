"""The server's log on standard error: a status line every few seconds, and optionally a JSON line per request."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from sarathi.engine.core_process.link import CoreDiedError
from sarathi.engine.outputs import CompletionOutput, RequestOutput
from sarathi.messages import CoreStats


class RequestLog:
    """Logs one JSON object per finished request. texts: include the prompt and the outputs."""

    def __init__(self, *, texts: bool) -> None:
        self._texts = texts

    def observe(self, output: RequestOutput) -> None:
        """Log the request if it has finished."""
        if output.finished:
            print(msgspec.json.encode(self._entry(output)).decode(), file=sys.stderr, flush=True)

    def _entry(self, output: RequestOutput) -> dict[str, Any]:
        times, arrived_s = output.metrics, output.metrics.arrival_time_s
        stages = {
            "queue_s": times.first_scheduled_time_s, "ttft_s": times.first_token_time_s, "e2e_s": times.finish_time_s
        }  # fmt: skip
        return {
            "request_id": output.request_id,
            "ended_at": time.time(),
            "prompt_tokens": len(output.prompt_token_ids),
            **{name: None if at_s is None else round(at_s - arrived_s, 6) for name, at_s in stages.items()},
            **({"prompt": output.prompt or list(output.prompt_token_ids)} if self._texts else {}),
            "completions": [self._completion(each) for each in output.outputs],
        }

    def _completion(self, each: CompletionOutput) -> dict[str, Any]:
        found = {"tokens": each.num_tokens, "finish_reason": each.finish_reason}
        return found | ({"text": each.text} if self._texts else {})


class TokenCounts(Protocol):
    """num_tokens: totals of prompt tokens and output tokens."""

    @property
    def num_tokens(self) -> tuple[int, int]: ...


GetStats = Callable[[], Awaitable[CoreStats]]


@contextmanager
def status_lines(get_stats: GetStats, counts: TokenCounts, interval_s: float | None) -> Iterator[None]:
    """Log status lines during the block."""
    if interval_s is None:
        yield
        return
    writing = asyncio.create_task(write_status(get_stats, counts, interval_s))
    try:
        yield
    finally:
        writing.cancel()


async def write_status(get_stats: GetStats, counts: TokenCounts, interval_s: float) -> None:
    """Log a line for every interval with running requests, until the engine dies."""
    before = counts.num_tokens
    while True:
        await asyncio.sleep(interval_s)
        now = counts.num_tokens
        try:
            stats = await get_stats()
        except CoreDiedError:
            return
        if now != before or stats.num_running or stats.num_waiting:
            rates = [(new - old) / interval_s for new, old in zip(now, before, strict=True)]
            print(_status(stats, *rates), file=sys.stderr, flush=True)
        before = now


def _status(stats: CoreStats, prompt_rate: float, output_rate: float) -> str:
    used, retained = (rows / max(stats.total_rows, 1) for rows in (stats.used_rows, stats.prefixes.num_retained_rows))
    return (
        f"running {stats.num_running}, waiting {stats.num_waiting}, KV cache {used:.1%} used, {retained:.1%} retained, "
        f"{stats.memory.mapped_bytes / 2**20:.1f} MiB mapped, {prompt_rate:.1f} prompt tokens/s, "
        f"{output_rate:.1f} output tokens/s"
    )
