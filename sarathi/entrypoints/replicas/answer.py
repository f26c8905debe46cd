"""The response of a forwarded request to the client: its pieces, or an error in the format of its API."""

from starlette.types import Send

from sarathi.entrypoints.anthropic.errors import error_event as anthropic_event
from sarathi.entrypoints.anthropic.errors import error_response as anthropic_response
from sarathi.entrypoints.replicas.messages import Begun, Head, Piece, WholeAnswer
from sarathi.entrypoints.server.errors import as_api_error
from sarathi.entrypoints.server.streaming import DONE, event, openai_error_event

_ANTHROPIC, _RESPONSES = "/v1/messages", "/v1/responses"


class Answer:
    """Holds the headers back until the body starts: until then another replica can serve the request."""

    def __init__(self, path: str, send: Send) -> None:
        self._path = path
        self._send = send
        self._head: Head | None = None
        self._is_head_sent = False
        self._num_events = 0
        self.has_begun = False

    async def put(self, piece: Piece) -> None:
        if isinstance(piece, Head):
            self._head = piece
        elif isinstance(piece, Begun):
            self.has_begun = True
        else:
            self.has_begun = True
            await self._send_head()
            self._num_events += piece.count(b"\n\n")
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await self._send_head()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def put_whole(self, answer: WholeAnswer) -> None:
        """Send a complete response."""
        self._head = answer.head
        await self.put(answer.body)
        await self.end()

    async def fail(self, error: Exception) -> None:
        """Send the error as the last event of a stream, or as the response if nothing was sent yet. Otherwise raise it,
        which closes the connection."""
        if not self._is_head_sent:
            await self._fail_whole(error)
        elif self._is_stream:
            await self.put(self._error_event(error))
            await self.end()
        else:
            raise error

    async def _fail_whole(self, error: Exception) -> None:
        told = as_api_error(error)
        response = anthropic_response(told) if self._path.startswith(_ANTHROPIC) else told.response()
        self._head = Head(response.status_code, tuple(response.raw_headers))
        await self.put(bytes(response.body))
        await self.end()

    def _error_event(self, error: Exception) -> bytes:
        if self._path.startswith(_ANTHROPIC):
            return anthropic_event(error)
        if self._path.startswith(_RESPONSES):
            told = as_api_error(error)
            fields = {"code": told.code, "message": told.message, "param": None}
            return event({"type": "error", **fields, "sequence_number": self._num_events}, "error") + DONE
        return openai_error_event(error)

    @property
    def _is_stream(self) -> bool:
        headers = dict(self._head.headers) if self._head is not None else {}
        return headers.get(b"content-type", b"").startswith(b"text/event-stream")

    async def _send_head(self) -> None:
        if self._is_head_sent:
            return
        head = self._head or Head(500, ())
        self._is_head_sent = True
        await self._send({"type": "http.response.start", "status": head.status, "headers": list(head.headers)})
