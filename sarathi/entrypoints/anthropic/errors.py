"""Errors in Anthropic's format, as responses and in streams."""

from typing import Any

from fastapi import Response

from sarathi.entrypoints.server.errors import APIError, as_api_error
from sarathi.entrypoints.server.streaming import event

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip


def error_body(error: APIError) -> dict[str, Any]:
    """The JSON object of an error response."""
    kind = _TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_event(error: Exception) -> bytes:
    """The last event of a failed stream."""
    return event(error_body(as_api_error(error)), "error")


def error_response(error: APIError) -> Response:
    """An error response."""
    return error.response(error_body)
