"""The gateway: forwards each request to a replica, and retries or reports an error when that dies.

A request whose response has not started is retried on another replica. One that has started ends with an error in the
format of its API. Requests about the server itself go to all replicas.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from sarathi.engine.async_llm import EngineUnavailableError
from sarathi.entrypoints.replicas.answer import Answer
from sarathi.entrypoints.replicas.merge import MERGES
from sarathi.entrypoints.replicas.messages import ForwardedRequest, Piece, WholeAnswer
from sarathi.entrypoints.replicas.prefix import routing_of
from sarathi.entrypoints.server.errors import ClientDisconnectedError, as_api_error, error_response
from sarathi.entrypoints.server.streaming import until_disconnected

_ATTEMPTS = 5
_RETRY_S = 0.25  # before the second attempt; grows by as much with each attempt
_IDLE_LOOK_S = 0.02


class ReplicaLostError(RuntimeError):
    """The replica or its engine died. name: of the replica, if it reported its engine's death; else ""."""

    def __init__(self, name: str = "") -> None:
        super().__init__("the engine that served the request died")
        self.name = name


class Replicas(Protocol):
    """The engines behind the gateway."""

    def stream(self, request: ForwardedRequest) -> AsyncGenerator[Piece, None]:
        """The response of one replica. ReplicaLostError before or during the response."""

    async def ask_all(self, request: ForwardedRequest) -> Sequence[WholeAnswer]:
        """The responses of all replicas that respond."""


class Gateway:
    """An ASGI application that forwards every request."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._is_draining = False
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self._num_open += 1
        try:
            request = await _read(scope, receive)
            work = self._merge(request, send) if request.path in MERGES else self._forward(request, send)
            await until_disconnected(receive, work)
        except ClientDisconnectedError:
            pass
        except HTTPException as error:  # from the limits on the body
            await error_response(as_api_error(error), scope)(scope, receive, send)
        finally:
            self._num_open -= 1

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests; return when the running ones have finished, or after the timeout."""
        self._is_draining = True
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while self._num_open and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(_IDLE_LOOK_S)

    async def _merge(self, request: ForwardedRequest, send: Send) -> None:
        answer = MERGES[request.path](await self._replicas.ask_all(request), self._is_draining)
        await Answer(request.path, send).put_whole(answer)

    async def _forward(self, request: ForwardedRequest, send: Send) -> None:
        answer = Answer(request.path, send)
        error: Exception = EngineUnavailableError("the server is draining and accepts no new requests")
        for attempt in range(0 if self._is_draining else _ATTEMPTS):
            await asyncio.sleep(attempt * _RETRY_S)
            try:
                await self._pass_on(request, answer)
                return
            except ReplicaLostError as lost:
                error = EngineUnavailableError(f"{lost}: the response is incomplete")
                if answer.has_begun:
                    break
                request = replace(request, avoided=(*request.avoided, lost.name))
        await answer.fail(error)

    async def _pass_on(self, request: ForwardedRequest, answer: Answer) -> None:
        async with aclosing(self._replicas.stream(request)) as pieces:
            async for each in pieces:
                await answer.put(each)
        await answer.end()


async def _read(scope: Scope, receive: Receive) -> ForwardedRequest:
    chunks, is_complete = [], False
    while not is_complete:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        chunks.append(message.get("body", b""))
        is_complete = not message.get("more_body", False)
    body = b"".join(chunks)
    prefix, owner = routing_of(scope["path"], body)
    headers = tuple((name, value) for name, value in Headers(scope=scope).raw if name != b"transfer-encoding")
    return ForwardedRequest(scope["method"], scope["path"], scope["query_string"], headers, body, prefix, owner)
