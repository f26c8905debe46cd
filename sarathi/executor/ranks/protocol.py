"""The messages between an executor and its ranks, and the interfaces that carry them."""

from typing import Any, NamedTuple, Protocol

from sarathi.config.schema import EngineConfig
from sarathi.messages import CacheCapacity, Resolution
from sarathi.model_executor.parallel.ranks import RankGrid
from sarathi.model_executor.sampling.grammar import MakeVocabulary, no_vocabulary


class RankSetup(NamedTuple):
    """The arguments of a rank.

    device: of this rank, as torch names it in the rank's process. store: host and port of the TCPStore for the ranks'
    rendezvous. make_vocabulary: for grammars.
    """

    config: EngineConfig
    rank: int
    grid: RankGrid
    device: str
    num_threads: int
    store: tuple[str, int]
    make_vocabulary: MakeVocabulary = no_vocabulary


class RankFacts(NamedTuple):
    """A rank's properties once its model is loaded; see Executor."""

    capacity: CacheCapacity
    vocab_size: int
    max_model_len: int
    token_bytes: int
    resolution: Resolution
    max_in_flight: int


class Command(NamedTuple):
    """Sent to every rank: the name of a `RankService` method and its arguments."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


class Reply(NamedTuple):
    """number: of the command that it answers or that failed."""

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
    """Whether a rank replies to a successful command. No rank answers launches; only one returns results."""
    return method in _ANSWERED or (method == "result" and rank == grid.result_rank)


class Channel(Protocol):
    """A rank's end of the connection to the executor."""

    def receive(self) -> bytes:
        """Wait for the next command. Raises EOFError or ConnectionError if the executor has ended."""

    def send(self, reply: bytes) -> None: ...


class RankEnd(NamedTuple):
    """How a rank ended. is_cause: by a signal or with its node; else possibly because another rank ended."""

    text: str
    is_cause: bool


class Transport(Protocol):
    """The executor's end: exchanges messages with all ranks and monitors their processes.

    end_delay_s: maximum time from a rank's loss of connection, as other ranks see it, until `end` reports its end.
    """

    size: int
    end_delay_s: float

    def send(self, message: bytes) -> None:
        """Send to every rank. Raises OSError if one cannot be reached."""

    def receive(self, timeout_s: float) -> list[tuple[int, Reply | None]]:
        """Replies received, each with its rank; None for a rank whose connection is closed."""

    def silence_s(self, rank: int) -> float:
        """Seconds since a rank's last heartbeat."""

    def end(self, rank: int) -> RankEnd | None:
        """How a rank ended; None while it runs."""

    def place(self, rank: int) -> str:
        """Description of a rank's process, for error messages."""

    def kill(self) -> None:
        """Kill every rank, even a stopped one, and release its resources. Idempotent and thread-safe; a concurrent
        `receive` returns."""

    def close(self) -> None:
        """Close the connections to killed ranks. Idempotent; no other thread may be using them."""


def kill_and_close(transport: Transport) -> None:
    transport.kill()
    transport.close()
