"""What passes between the gateway and a replica: a request, and the pieces of its answer."""

from dataclasses import dataclass

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class ForwardedRequest:
    """A whole HTTP request.

    path: decoded. query: as it was sent, without "?". prefix: hashes of how its prompt begins, see `prompt_prefix`.
    owner: the replica that alone can answer it; "": any. avoided: replicas that have said that they cannot.
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
    """How an answer begins; its body follows as bytes."""

    status: int
    headers: Headers


@dataclass(frozen=True)
class Begun:
    """The engine has computed the first token: the request is not repeated at another replica."""


Piece = Head | Begun | bytes


@dataclass(frozen=True)
class WholeAnswer:
    """An answer in one piece. replica: who gave it."""

    replica: str
    head: Head
    body: bytes
