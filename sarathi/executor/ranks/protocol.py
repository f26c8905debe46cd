"""The messages between an executor and its ranks, and what carries them."""

from typing import Any, NamedTuple, Protocol

from sarathi.config.schema import EngineConfig
from sarathi.messages import CacheCapacity, Resolution
from sarathi.model_executor.parallel.ranks import RankGrid
from sarathi.model_executor.sampling.grammar import MakeVocabulary, no_vocabulary


class RankSetup(NamedTuple):
    """What a rank is built from.

    device: this rank's, as torch names it in the rank's process. store: host and port of the TCPStore where ranks find
    each other. make_vocabulary: for grammars.
    """

    config: EngineConfig
    rank: int
    grid: RankGrid
    device: str
    num_threads: int
    store: tuple[str, int]
    make_vocabulary: MakeVocabulary = no_vocabulary


class RankFacts(NamedTuple):
    """What a rank tells when its model is loaded; see Executor."""

    capacity: CacheCapacity
    vocab_size: int
    max_model_len: int
    token_bytes: int
    resolution: Resolution
    max_in_flight: int


class Command(NamedTuple):
    """What the executor sends every rank: a method of `RankService` by name, with its arguments."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


class Reply(NamedTuple):
    """number: of the command that it answers, or that failed."""

    number: int
    value: Any = None
    error: Exception | None = None


_ANSWERED = frozenset(
    (
        "facts", "wait", "memory_stats", "resize_cache", "drop_weights", "load_weights", "check_integrity", "busy_s",
        "fingerprint", "close", "start_sending", "start_receiving", "arrive",
    )
)  # by every rank  # fmt: skip


def is_answered(method: str, rank: int, grid: RankGrid) -> bool:
    """Whether a rank replies to a command that succeeds. Launches are not waited for; one rank alone tells results."""
    return method in _ANSWERED or (method == "result" and rank == grid.result_rank)


class Channel(Protocol):
    """A rank's end of the connection to the executor."""

    def receive(self) -> bytes:
        """The next command. Raises EOFError or ConnectionError where the executor is gone."""

    def send(self, reply: bytes) -> None: ...


class RankEnd(NamedTuple):
    """How a rank ended. is_cause: by a signal or with its node; otherwise it may have ended because another did."""

    text: str
    is_cause: bool


class Transport(Protocol):
    """The executor's end: messages to and from all ranks, and what is known of the life of each.

    end_delay_s: at most so long after others have lost their connection to a rank, `end` tells of its end.
    """

    size: int
    end_delay_s: float

    def send(self, message: bytes) -> None:
        """To every rank. Raises OSError where one cannot be reached."""

    def receive(self, timeout_s: float) -> list[tuple[int, Reply | None]]:
        """Replies that have come, each with its rank; None from a rank whose connection is closed."""

    def silence_s(self, rank: int) -> float:
        """Seconds since a rank's last sign of life."""

    def end(self, rank: int) -> RankEnd | None:
        """None while the rank runs."""

    def place(self, rank: int) -> str:
        """Its process, in words."""

    def kill(self) -> None:
        """End every rank, also one that is stopped, and free what they run on. Any thread may call it, again too; one
        that waits in `receive` returns."""

    def close(self) -> None:
        """Close the connections to ranks that were killed. May be called again; not while another thread uses them."""


def kill_and_close(transport: Transport) -> None:
    transport.kill()
    transport.close()
