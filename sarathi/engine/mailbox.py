"""Passes a request's newest output, an error or a timeout to the task that waits for it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from sarathi.engine.outputs import RequestOutput


class RequestTimeoutError(TimeoutError):
    """A request did not finish within its timeout."""


class Mailbox:
    """Holds a request's newest output until its caller takes it. Outputs are merged, so slow callers use no memory."""

    def __init__(self) -> None:
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._is_filled = asyncio.Event()
        self.is_awaited = False  # whether a caller is waiting in `take`

    def put(self, output: RequestOutput) -> None:
        """Store an output. An output that has not been taken yet is merged into it."""
        self._output = output if self._output is None else _merged(self._output, output)
        self._is_filled.set()

    def fail(self, error: Exception) -> None:
        """Make `take` raise this error, unless the final output is already stored."""
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
        """Fail with RequestTimeoutError unless the block ends in time. None: no timeout."""
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
    """The later output with the deltas of both."""
    for before, after in zip(earlier.outputs, later.outputs, strict=True):
        after.delta = before.delta + after.delta
    return later
