"""Errors in Anthropic's form, in answers and in streams."""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from sarathi.entrypoints.server.errors import APIError, as_api_error, invalid_request
from sarathi.entrypoints.server.streaming import event

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


class AnthropicRoute(APIRoute):
    """A route whose errors have Anthropic's form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return error_response(invalid_request(error))
            except Exception as error:
                return error_response(as_api_error(error))

        return guarded


def error_event(error: Exception) -> bytes:
    """The last event of a stream that failed."""
    return event(_body(as_api_error(error)), "error")


def error_response(error: APIError) -> Response:
    """An answer that is an error."""
    content = msgspec.json.encode(_body(error))
    return Response(content, error.status, error.headers, media_type="application/json")


def _body(error: APIError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
