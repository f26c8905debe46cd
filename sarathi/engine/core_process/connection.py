"""A front end's link to a core that another process started."""

import asyncio
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import zmq

from sarathi.engine.core_process import wire
from sarathi.engine.core_process.link import CoreDiedError, CoreLink
from sarathi.engine.core_process.process import SHARED_COMMANDS, SHARED_REPORTS

_ENDED = "the core process ended"


class CoreConnection(CoreLink):
    """A link to a running core.

    core_life: read end of a pipe. Only the core process holds the write end, so end of file means that the core ended.
    """

    def __init__(self, folder: Path, name: str, core_life: int) -> None:
        super().__init__(name, zmq.DEALER)
        self._reports.setsockopt(zmq.IDENTITY, name.encode())
        self._commands.connect(f"ipc://{folder / SHARED_COMMANDS}")
        self._reports.connect(f"ipc://{folder / SHARED_REPORTS}")
        self._core_life = core_life
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(core_life, self._ended.set)

    @classmethod
    async def join(cls, folder: Path, name: str, core_life: int) -> "CoreConnection":
        """Connect to a running core. folder: contains its sockets. Raises CoreDiedError if the core has ended."""
        link = cls(folder, name, core_life)
        try:
            await link._join()
        except BaseException:
            await link.close()
            raise
        return link

    def kill(self) -> None:
        """No effect: the core belongs to another process."""

    async def close(self) -> None:
        self._stop()
        self._release()

    def _watch(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._watch_exit(),)

    async def _watch_exit(self) -> None:
        await self._ended.wait()
        self._fail(_ENDED)

    async def _join(self) -> None:
        await self._reports.send(wire.encode(wire.Join()))
        started, ended = asyncio.ensure_future(self._reports.recv()), asyncio.ensure_future(self._ended.wait())
        await asyncio.wait((started, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not started.done():
            started.cancel()
            raise CoreDiedError(_ENDED)
        report = wire.decode_report(started.result())
        assert isinstance(report, wire.Started)
        self.facts = report.facts

    def _release(self) -> None:
        super()._release()
        if self._core_life >= 0:
            asyncio.get_running_loop().remove_reader(self._core_life)
            os.close(self._core_life)
            self._core_life = -1
