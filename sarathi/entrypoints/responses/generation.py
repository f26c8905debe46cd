"""Generate one response: complete, as events, or in the background."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

from sarathi.engine.async_llm import Outputs
from sarathi.engine.outputs import RequestOutput
from sarathi.entrypoints.openai.generation import numbered
from sarathi.entrypoints.parsing.answer_parser import AnswerParser
from sarathi.entrypoints.parsing.parts import Text
from sarathi.entrypoints.responses.output import COMPLETED, INCOMPLETE, OutputStream
from sarathi.entrypoints.responses.response import fail, finish
from sarathi.entrypoints.responses.store import ResponseStore, StoredResponse
from sarathi.entrypoints.server.streaming import DONE, Events


class Generation:
    """Generates the output of one response. store: None if the response is not stored."""

    def __init__(
        self, outputs: Outputs, parser: AnswerParser, stream: OutputStream, stored: StoredResponse,
        store: ResponseStore | None,
    ) -> None:  # fmt: skip
        self._outputs, self._parser, self._stream = outputs, parser, stream
        self._stored, self._store = stored, store

    @property
    def response(self) -> dict[str, Any]:
        return self._stored.response

    async def whole(self) -> dict[str, Any]:
        """The complete response."""
        async for _ in self._grow():
            pass
        return self.response

    async def events(self) -> Events:
        """From response.created to the final event, which may be an error."""
        yield self._stream.event("response.created", response=self.response)
        yield self._stream.event("response.in_progress", response=self.response)
        try:
            async with aclosing(self._grow()) as events:
                async for each in events:
                    yield each
        except Exception as error:
            fail(self.response, error)
            self._keep()
        yield self._stream.event(f"response.{self.response['status']}", response=self.response)
        yield DONE

    async def in_background(self) -> None:
        """Store the result: completed, failed, or cancelled with the task."""
        self._keep()
        try:
            await self.whole()
        except asyncio.CancelledError:
            self.response["status"] = "cancelled"
            self._keep()
        except Exception as error:
            fail(self.response, error)
            self._keep()

    async def _grow(self) -> Events:
        async with aclosing(numbered([self._outputs])) as all_outputs:
            async for _, output in all_outputs:
                newest = output.outputs[0]
                is_cut = newest.finish_reason != "stop"
                for each in self._stream.add(self._parser.push(newest.delta, newest.finished, is_cut)):
                    yield each
        for each in self._end(output):
            yield each

    def _end(self, output: RequestOutput) -> Iterator[bytes]:
        """An empty output becomes an empty message."""
        status = COMPLETED if output.outputs[0].finish_reason == "stop" else INCOMPLETE
        if not self._stream.items:
            yield from self._stream.add([Text("")])
        yield from self._stream.close(status)
        finish(self.response, self._stream.items, output, status)
        self._keep()

    def _keep(self) -> None:
        if self._store is not None:
            self._store.put(self._stored)
