"""Messages between the gateway and a replica: a request and the pieces of its response."""

from dataclasses import dataclass

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class ForwardedRequest:
    """A whole HTTP request.

    path: decoded. query: as sent, without "?". prefix: hashes of the prompt's prefixes, see `prompt_prefix`.
    owner: the only replica that can serve it; "": any. avoided: replicas whose engine is dead.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    prefix: tuple[int, ...] = ()
    owner: str = ""
    avoided: tuple[str, ...] = ()


@dataclass(frozen=True)
class Head:
    """Status and headers; the body follows as bytes."""

    status: int
    headers: Headers


@dataclass(frozen=True)
class Begun:
    """The engine has computed the first token: the request is no longer retried on another replica."""


Piece = Head | Begun | bytes


@dataclass(frozen=True)
class WholeAnswer:
    """A complete response. replica: its sender."""

    replica: str
    head: Head
    body: bytes
