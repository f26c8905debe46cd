"""Messages between a core process and its clients, encoded as MessagePack. Needs the `server` extra."""

from array import array
from typing import Any

import msgspec

from sarathi.messages import CoreStats, EngineFacts, NewRequest, RequestUpdate


class AddRequests(msgspec.Struct, frozen=True, tag=True):
    """Queue requests, all or none of them."""

    requests: tuple[NewRequest, ...]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """End requests from outside; for the fields see `CoreClient.finish`."""

    request_ids: tuple[str, ...]
    reason: str
    stop_reason: str | None = None


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Answered by Stats."""


class SetCacheBudget(msgspec.Struct, frozen=True, tag=True):
    """See `EngineCore.set_cache_budget`. Answered by Done."""

    memory_bytes: int


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """See `CoreClient.sleep`. Answered by Done."""

    level: int = 1


class WakeUp(msgspec.Struct, frozen=True, tag=True):
    """See `CoreClient.wake_up`. Answered by Done."""


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """See `EngineCore.reset_prefix_cache`. Answered by Done."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End every request and the process."""


class Join(msgspec.Struct, frozen=True, tag=True):
    """Register a front end. Answered by Started."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """The front end of this name has gone; its requests end."""

    name: str


MemoryChange = SetCacheBudget | Sleep | WakeUp | ResetPrefixCache
"""Commands answered by Done."""
Command = AddRequests | Finish | GetStats | MemoryChange | Shutdown | Join | Leave
"""Client to core."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded. The first report to each client, unless it is StartFailed."""

    facts: EngineFacts


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The process ends. is_user_error: whether the user can correct what the message names."""

    message: str
    is_user_error: bool


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """One step's outputs; for the fields see `CoreOutput`."""

    updates: tuple[RequestUpdate, ...]
    first_scheduled: tuple[str, ...] = ()
    scheduled_at_s: float = 0.0


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The requests of one AddRequests were rejected."""

    request_ids: tuple[str, ...]
    message: str


class StepFailed(msgspec.Struct, frozen=True, tag=True):
    """A step failed: all requests of this client have ended without another update. The core accepts new ones."""

    request_ids: tuple[str, ...]
    message: str


class Stats(msgspec.Struct, frozen=True, tag=True):
    """See `EngineCore.stats`."""

    core: CoreStats


class Done(msgspec.Struct, frozen=True, tag=True):
    """The oldest pending MemoryChange is done, or rejected with this error."""

    error: str | None = None


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """The process is alive, whatever its current step does."""


Report = Started | StartFailed | StepOutputs | Refused | StepFailed | Stats | Done | Heartbeat
"""Core to client."""


def _bytes_of(tokens: Any) -> bytes:
    """Token ids as MessagePack takes them."""
    if not isinstance(tokens, array):
        raise TypeError(f"{type(tokens).__name__} has no form in MessagePack")
    return tokens.tobytes()


encode = msgspec.msgpack.Encoder(enc_hook=_bytes_of).encode
decode_command = msgspec.msgpack.Decoder(Command, dec_hook=lambda _, tokens: array("q", tokens)).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
