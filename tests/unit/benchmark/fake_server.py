"""A small OpenAI-compatible server on the loopback device, in a thread: it streams on a timetable that tests know."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class Behaviour:
    """first_s, gap_s: delays before the first and between further tokens. trouble: request number -> what fails; "kill"
    ends the whole server in the middle of that answer.

    frames: chunks without a token open (chat) and close the answer, the last has the usage, and no [DONE] follows, as
    with `transformers serve`. text_only: prompts of token ids are refused, as there. silent_end: the last token is an
    end without text, which only the closing chunk tells. hangs_up: a connection is closed soon after its answer.

    bodies, headers, arrived_at_s: what came of each request, and when by time.perf_counter().
    """

    first_s: float = 0.02
    gap_s: float = 0.005
    usage: bool = True
    models: tuple[str, ...] = ("fake-model",)
    frames: bool = False
    silent_end: bool = False
    hangs_up: bool = False
    text_only: bool = False
    trouble: dict[int, str] = field(default_factory=dict)
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    arrived_at_s: list[float] = field(default_factory=list)
    stop_listening: Callable[[], Awaitable[None]] | None = None
    dead: bool = False
    num_running: int = 0
    peak_running: int = 0
    url: str = ""


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Behaviour]:
    """The server is up inside the block, at behaviour.url."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(_app(behaviour), shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    behaviour.stop_listening = site.stop
    behaviour.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield behaviour
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


def _app(behaviour: Behaviour) -> web.Application:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "root": name} for name in behaviour.models]})

    async def complete(request: web.Request) -> web.StreamResponse:
        number, transport = len(behaviour.bodies), request.transport
        behaviour.bodies.append(await request.json())
        behaviour.headers.append(dict(request.headers))
        behaviour.arrived_at_s.append(time.perf_counter())
        behaviour.num_running += 1
        behaviour.peak_running = max(behaviour.peak_running, behaviour.num_running)
        try:
            return await _answer(request, behaviour, number)
        finally:
            behaviour.num_running -= 1
            if behaviour.hangs_up:
                asyncio.get_running_loop().call_later(0.01, transport.close)

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    app.router.add_post("/v1/chat/completions", complete)
    return app


async def _answer(request: web.Request, behaviour: Behaviour, number: int) -> web.StreamResponse:
    body, trouble = behaviour.bodies[number], behaviour.trouble.get(number)
    if trouble == "500":
        return web.json_response({"error": {"message": "out of order"}}, status=500)
    if behaviour.text_only and isinstance(body.get("prompt"), list):
        return web.json_response({"detail": "a prompt must be text"}, status=400)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if behaviour.frames and "messages" in body:
        await _send(response, {"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
    for index in range(_num_tokens(body)):
        await asyncio.sleep(behaviour.gap_s if index else behaviour.first_s)
        if trouble == "hang":
            await asyncio.sleep(3600)
        if trouble == "error" and index == 2:
            await _send(response, {"error": {"message": "lost my mind", "code": 500}})
            return response
        if trouble == "kill" and index == 2:
            behaviour.dead = True
            await behaviour.stop_listening()
        if behaviour.dead:
            request.transport.abort()
            return response
        if trouble == "cut" and index == 2:
            return response
        if not (behaviour.silent_end and index == _num_tokens(body) - 1):
            await _send_in_pieces(response, {"choices": [_choice(body, f"t{index} ")]})
    if behaviour.frames:
        closing = {"choices": [_choice(body, "") | {"finish_reason": "length"}]}
        await _send(response, closing | ({"usage": _usage(body)} if behaviour.usage else {}))
        return response
    if behaviour.usage:
        await _send(response, {"choices": [], "usage": _usage(body)})
    await response.write(b"data: [DONE]\n\n")
    return response


def _num_tokens(body: dict) -> int:
    return body.get("max_tokens") or body["max_completion_tokens"]


def _choice(body: dict, text: str) -> dict:
    if "messages" in body:
        return {"index": 0, "delta": {"content": text} if text else {}}
    return {"index": 0, "text": text}


def _usage(body: dict) -> dict:
    """A prompt of text is counted as twice its words, so that a client's own count shows."""
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"][0]["text"]
    count = len(prompt) if isinstance(prompt, list) else 2 * len(prompt.split())
    return {"prompt_tokens": count, "completion_tokens": _num_tokens(body)}


async def _send(response: web.StreamResponse, content: dict) -> None:
    await response.write(f"data: {json.dumps(content)}\n\n".encode())


async def _send_in_pieces(response: web.StreamResponse, content: dict) -> None:
    """An event may arrive cut anywhere, and after a comment."""
    data = f": comment\ndata: {json.dumps(content)}\n\n".encode()
    await response.write(data[:17])
    await response.write(data[17:])
