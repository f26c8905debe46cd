"""Send requests on schedule, with a limit on concurrency."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from sarathi.benchmark.run.processes import ended_by_signals
from sarathi.benchmark.serve.client import Endpoint, OutgoingRequest, RequestResult, send
from sarathi.entrypoints.progress import RequestBar

SPARE_FILES = 64  # what a process has open besides its connections


class ServerError(OSError):
    """The server cannot be reached, or its response is invalid."""


@dataclass(frozen=True)
class LoadPlan:
    """max_concurrency: None: no limit. num_warmups: how often the first request is sent before, to be forgotten: the
    other prompts stay new to a server that remembers prompts."""

    base_url: str
    path: str
    is_chat: bool
    model: str | None
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    requests: Sequence[OutgoingRequest]
    max_concurrency: int | None = None
    num_warmups: int = 0
    timeout_s: float = 21600.0
    show_progress: bool = True


@dataclass
class LoadOutcome:
    """Results in order of completion. interrupted: ended by ^C; requests in flight are not in results.

    duration_s: from the end of the warm-up to the end of the load or ^C.
    """

    model: str = ""
    results: list[RequestResult] = field(default_factory=list)
    duration_s: float = 0.0
    interrupted: bool = False


def run_load(plan: LoadPlan) -> LoadOutcome:
    """Send all requests and wait for their results. ServerError if the server is unreachable or the warm-up fails."""
    outcome = LoadOutcome()
    _allow_open_files(plan.max_concurrency or len(plan.requests))
    try:
        with ended_by_signals():
            asyncio.run(_run(plan, outcome))
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


def _allow_open_files(num_connections: int) -> None:
    """Raise the limit of open files, one per connection: the default is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


async def _run(plan: LoadPlan, outcome: LoadOutcome) -> None:
    timeout = aiohttp.ClientTimeout(total=plan.timeout_s)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # servers may close a connection that they said to keep
    async with aiohttp.ClientSession(headers=plan.headers, timeout=timeout, connector=connector) as session:
        outcome.model = plan.model or await _first_model(session, plan.base_url)
        endpoint = Endpoint(plan.base_url + plan.path, plan.is_chat, {"model": outcome.model, **plan.body})
        await _warm_up(session, endpoint, plan)
        start_s = time.perf_counter()
        try:
            await _send_all(session, endpoint, plan, outcome.results, start_s)
        finally:
            outcome.duration_s = time.perf_counter() - start_s


async def _send_all(
    session: aiohttp.ClientSession, endpoint: Endpoint, plan: LoadPlan, results: list[RequestResult], start_s: float
) -> None:
    """Append results as they arrive, so that ^C keeps them."""
    with RequestBar(len(plan.requests), shown=plan.show_progress) as bar:
        gate = asyncio.Semaphore(plan.max_concurrency) if plan.max_concurrency else nullcontext()

        def tell(result: RequestResult) -> None:
            results.append(result)
            bar.add(1, result.output_tokens)

        jobs = [  # tasks start in this order; coroutines handed to as_completed would in any
            asyncio.ensure_future(_talk(session, endpoint, turns, gate, start_s, tell)) for turns in _talks(plan)
        ]
        try:
            for job in asyncio.as_completed(jobs):
                await job
        finally:  # after an interrupt no job may go on with a session that is closed
            for unfinished in jobs:
                unfinished.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)


def _talks(plan: LoadPlan) -> list[list[OutgoingRequest]]:
    """The turns of each conversation; a single request is a conversation of one turn."""
    talks: dict[tuple[str, int], list[OutgoingRequest]] = {}
    for number, request in enumerate(plan.requests):
        key = ("request", number) if request.conversation is None else ("conversation", request.conversation)
        talks.setdefault(key, []).append(request)
    return list(talks.values())


async def _talk(
    session: aiohttp.ClientSession, endpoint: Endpoint, turns: Sequence[OutgoingRequest], gate: Any, start_s: float,
    tell: Callable[[RequestResult], None],
) -> None:  # fmt: skip
    """Send the turns in order; a failure ends the conversation."""
    due_at_s, history = start_s, tuple[str, ...]()
    for turn in turns:
        due_at_s += turn.send_at_s
        await asyncio.sleep(max(due_at_s - time.perf_counter(), 0.0))
        async with gate:
            result = await send(session, endpoint, replace(turn, history=history), due_at_s)
        tell(result)
        if result.error:
            return
        history = (*history, str(turn.prompt), result.text)
        due_at_s = time.perf_counter()


async def _warm_up(session: aiohttp.ClientSession, endpoint: Endpoint, plan: LoadPlan) -> None:
    request = plan.requests[0]
    for _ in range(plan.num_warmups):
        result = await send(session, endpoint, request)
        if result.error:
            raise ServerError(f"the warm-up failed: {result.error}")


async def _first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    url = f"{base_url}/v1/models"
    try:
        async with session.get(url) as response:
            response.raise_for_status()
            names: list[str] = [model["id"] for model in (await response.json())["data"]]
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, LookupError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ServerError(
            f"{url} returned no model list ({told}); is the server up? With --model no list is needed"
        ) from error
    if not names:
        raise ServerError(f"{url} lists no model: set --model")
    return names[0]
