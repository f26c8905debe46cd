"""What a request's task waits for: the newest output, an error, or the end of its time."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from sarathi.engine.outputs import RequestOutput


class RequestTimeoutError(TimeoutError):
    """A request was not done in the time that it had."""


class Mailbox:
    """The newest output of a request, until its caller takes it: a caller that is slow needs no more memory."""

    def __init__(self) -> None:
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._is_filled = asyncio.Event()
        self.is_awaited = False  # not where the caller does something else between two outputs

    def put(self, output: RequestOutput) -> None:
        """Replace an output that has not been taken; its delta is kept."""
        self._output = output if self._output is None else _merged(self._output, output)
        self._is_filled.set()

    def fail(self, error: Exception) -> None:
        """Have `take` raise this, unless the last output waits to be taken."""
        self._error = error
        self._is_filled.set()

    async def take(self) -> RequestOutput:
        """Wait for the next output."""
        self.is_awaited = True
        try:
            await self._is_filled.wait()
        finally:
            self.is_awaited = False
        output, self._output = self._output, None
        if self._error is not None and not (output and output.finished):
            raise self._error
        self._is_filled.clear()
        assert output is not None
        return output

    @contextmanager
    def deadline(self, timeout_s: float | None) -> Iterator[None]:
        """Fail with RequestTimeoutError unless this ends in time. None: any time."""
        if timeout_s is None:
            yield
            return
        error = RequestTimeoutError(f"the request was not done within {timeout_s:g} s")
        timer = asyncio.get_running_loop().call_later(timeout_s, self.fail, error)
        try:
            yield
        finally:
            timer.cancel()


def _merged(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """The later output, which nobody has taken yet, now with what both of them added to the texts."""
    for before, after in zip(earlier.outputs, later.outputs, strict=True):
        after.delta = before.delta + after.delta
    return later
