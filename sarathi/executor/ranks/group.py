"""Sends a command to all ranks and collects their replies. A failure ends every rank."""

import math
import pickle
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from sarathi.executor.ranks.protocol import Command, RankEnd, Reply, Transport, is_answered, kill_and_close
from sarathi.model_executor.parallel.ranks import RankGrid

SILENCE_S = 8.0  # without a heartbeat until a rank counts as hung; a rank sends several per second
START_SILENCE_S = 60.0  # the same during start: loading a library can block every thread
_POLL_INTERVAL_S = 0.25  # between health checks while waiting for a reply
_RECHECK_DELAY_S = 0.5  # before a silent rank is checked again: this process itself may have been paused


class RankError(RuntimeError):
    """A rank died, hung or failed; the message names it."""


class RankGroup:
    """The ranks of a transport. They end when this object is collected, if not before.

    Only one thread at a time may send commands. Any thread may call `failure` and `kill` at any time.
    """

    def __init__(self, transport: Transport, grid: RankGrid) -> None:
        self._transport, self._grid = transport, grid
        self._number = 0
        self._failure = "they were closed"
        self._role = ""
        self._partners: list[RankGroup] = []
        self.are_running = True
        self._close = weakref.finalize(self, kill_and_close, transport)

    def join(self, role: str, partner: "RankGroup") -> None:
        """Make these ranks fail when those of another engine fail. role: of this engine, for error messages."""
        self._role = f"{role} "
        self._partners.append(partner)

    def failure(self) -> str | None:
        """Why the ranks have failed; None if they have not. Thread-safe."""
        if not self.are_running:
            return self._failure
        return self._death() or next((self._describe_end(rank, end) for rank, end in self._ends()), None)

    def ask(self, method: str, *arguments: Any, silence_s: float = SILENCE_S, limit_s: float = math.inf) -> list[Any]:
        """Send a command to every rank. Returns the replies of those that answer it, in order of rank.

        Raises RankError, or the ValueError of a rank. silence_s: without a heartbeat until a rank counts as hung.
        limit_s: timeout for all replies.
        """
        if not self.are_running:
            raise RankError(f"{method} cannot be run, the ranks have ended: {self._failure}")
        self._number += 1
        message = pickle.dumps(Command(self._number, method, arguments))
        with self._ended_by_errors():
            self._check_silence(silence_s)
            self._send(message)
            answering = [rank for rank in range(self._transport.size) if is_answered(method, rank, self._grid)]
            return self._replies(answering, silence_s, time.monotonic() + limit_s)

    def check_health(self) -> None:
        """Raise RankError if a rank, or a partner's rank, has died or hangs."""
        if not self.are_running:
            raise RankError(self._failure)
        with self._ended_by_errors():
            self._check_silence(SILENCE_S)
            if self._ends():
                self._fail()

    def kill(self, reason: str | None = None) -> None:
        """End every rank. Idempotent. reason: the error of commands that are waiting or come later, unless the ranks
        have already ended."""
        if reason is not None and self.are_running:
            self._failure = reason
        self.are_running = False
        self._transport.kill()

    def close(self) -> None:
        """End every rank and close the connections to them. Idempotent. No thread may be waiting for a reply."""
        self.kill()
        self._close()

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        try:
            yield
        except (RankError, ValueError) as error:
            if not self.are_running:  # killed by another thread, whose reason is the cause of this error
                raise RankError(self._failure) from error
            self.kill(str(error))
            raise

    def _send(self, message: bytes) -> None:
        try:
            self._transport.send(message)
        except OSError:
            self._fail()
        except BaseException:  # only some ranks may have received the message
            self.kill()
            raise

    def _replies(self, answering: Sequence[int], silence_s: float, deadline_s: float) -> list[Any]:
        replies: dict[int, Any] = {}
        while len(replies) < len(answering):
            for rank, reply in self._transport.receive(_POLL_INTERVAL_S):
                if reply is None or reply.error is not None:
                    self._fail(rank, reply)
                if reply.number == self._number:  # else it answers an abandoned command
                    replies[rank] = reply.value
            self._check_silence(silence_s)
            if time.monotonic() > deadline_s and len(replies) < len(answering):
                raise RankError(f"ranks that did not answer: {sorted(set(answering) - set(replies))}")
        return [replies[rank] for rank in answering]

    def _check_silence(self, silence_s: float) -> None:
        if self._silent(silence_s):
            time.sleep(_RECHECK_DELAY_S)
            for rank in self._silent(silence_s):
                silent_s = self._transport.silence_s(rank)
                raise RankError(f"{self._name(rank)} hangs: no sign of life for {silent_s:.1f} s")
        self._check_partners()

    def _silent(self, silence_s: float) -> list[int]:
        return [rank for rank in range(self._transport.size) if self._transport.silence_s(rank) > silence_s]

    def _check_partners(self) -> None:
        for failure in filter(None, [partner.failure() for partner in self._partners]):
            raise RankError(self._death() or failure)  # a death here also ends the partner

    def _fail(self, first: int | None = None, reply: Reply | None = None) -> NoReturn:
        """Raise the cause of the failure: a user error, else a rank's death by signal, else the first rank's error."""
        if reply is not None and isinstance(reply.error, ValueError):
            raise reply.error
        deadline = time.monotonic() + self._transport.end_delay_s
        while (death := self._death()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if death is not None:
            raise RankError(death)
        self._check_partners()
        if first is not None and reply is not None:
            raise RankError(f"{self._role}rank {first} of {self._transport.size} failed: {reply.error}")
        for rank, end in self._ends():
            raise RankError(self._describe_end(rank, end))
        raise RankError(f"a rank of {self._transport.size} closed its connection")

    def _death(self) -> str | None:
        """The death of a rank that another rank's end does not explain; None if there is none."""
        return next((self._describe_end(rank, end) for rank, end in self._ends() if end.is_cause), None)

    def _describe_end(self, rank: int, end: RankEnd) -> str:
        return f"{self._name(rank)} {end.text}"

    def _ends(self) -> list[tuple[int, RankEnd]]:
        ends = [(rank, self._transport.end(rank)) for rank in range(self._transport.size)]
        return [(rank, end) for rank, end in ends if end is not None]

    def _name(self, rank: int) -> str:
        return f"{self._role}rank {rank} of {self._transport.size} ({self._transport.place(rank)})"
