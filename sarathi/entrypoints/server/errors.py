"""Error responses: an HTTP status and a JSON object in the format of the API that the route belongs to."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from sarathi.core.scheduler import RequestTooLongError
from sarathi.engine.admission import OverloadedError
from sarathi.engine.async_llm import EngineUnavailableError, StepFailedError
from sarathi.engine.core_process.link import CoreDiedError
from sarathi.engine.mailbox import RequestTimeoutError
from sarathi.engine.outputs import RequestOutput
from sarathi.sampling_params import SamplingParams
from sarathi.wording import short_repr

logger = logging.getLogger(__name__)
ERROR_BODY = "sarathi.error_body"  # entry of a request's scope: an ErrorBody, or nothing
_INVALID, _SERVER = "invalid_request_error", "server_error"
_SAMPLING_FIELDS = frozenset(each.name for each in fields(SamplingParams))


@dataclass
class APIError(Exception):
    """status: HTTP status. type, param, code: fields of OpenAI's error object."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def body(self) -> dict[str, Any]:
        """The JSON object in OpenAI's format."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self, form: "ErrorBody | None" = None) -> Response:
        """The HTTP response. form: builds its JSON object; None: OpenAI's format."""
        content = msgspec.json.encode(self.body() if form is None else form(self))
        return Response(content, self.status, self.headers, media_type="application/json")


ErrorBody = Callable[[APIError], dict[str, Any]]


class APIFamily(APIRouter):
    """Routes at or below a path, with an error format of their own, also for errors of the middleware."""

    def __init__(self, path: str, error_body: ErrorBody, **settings: Any) -> None:
        super().__init__(**settings)
        self.path = path
        self.error_body = error_body

    def has(self, path: str) -> bool:
        """Whether a path belongs to the family, even if no route matches it."""
        return path == self.path or path.startswith(f"{self.path}/")


class RequestFailedError(RuntimeError):
    """The engine failed this request; others continue. The message is the reason."""


class ClientDisconnectedError(ConnectionError):
    """The client closed its connection before the response was complete."""


@contextmanager
def user_errors(prompt_field: str, max_model_len: int) -> Iterator[None]:
    """Turn ValueErrors into status 400. prompt_field: the field to name if the prompt is too long."""
    try:
        yield
    except RequestTooLongError as error:
        message = f"This model's maximum context length is {max_model_len} tokens. However, {error}."
        raise APIError(400, message, param=prompt_field, code="context_length_exceeded") from None
    except ValueError as error:
        field = str(error).partition(" ")[0]
        raise APIError(400, str(error), param=field if field in {prompt_field, *_SAMPLING_FIELDS} else None) from None


def check_not_failed(output: RequestOutput) -> None:
    """Raise RequestFailedError if a completion ended with finish reason "error"."""
    for each in output.outputs:
        if each.finish_reason == "error":
            raise RequestFailedError(f"the request failed: {each.stop_reason}")


def as_api_error(error: Exception) -> APIError:
    """The client's view of any exception. An unexpected one is logged, and the client sees only its type."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, OverloadedError):
        retry = {"Retry-After": str(error.retry_after_s)}
        return APIError(429, str(error), "rate_limit_error", code="overloaded", headers=retry)
    if isinstance(error, (EngineUnavailableError, CoreDiedError)):
        return APIError(503, str(error), "service_unavailable_error", code="unavailable")
    if isinstance(error, RequestTimeoutError):
        return APIError(408, str(error), "timeout_error", code="request_timeout")
    if isinstance(error, (StepFailedError, RequestFailedError)):
        return APIError(500, str(error), _SERVER)
    if isinstance(error, HTTPException):
        return APIError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, ClientDisconnectedError):
        return APIError(499, "the client closed the connection")
    logger.error("an unexpected error ended a request", exc_info=error)
    return APIError(500, f"an unexpected {type(error).__name__} ended the request", _SERVER)


def error_response(error: APIError, scope: Scope) -> Response:
    """The error response in the format of the family that the request's path belongs to, else in OpenAI's."""
    return error.response(scope.get(ERROR_BODY))


def add_error_handlers(app: FastAPI) -> None:
    """Turn errors of routes, of routing and of validation into error responses."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (APIError, *_EXPECTED, Exception):
        app.add_exception_handler(kind, _on_known)


_EXPECTED = (
    OverloadedError, EngineUnavailableError, CoreDiedError, RequestTimeoutError, StepFailedError, RequestFailedError,
    ClientDisconnectedError,
)  # fmt: skip


async def _on_known(request: Request, error: Exception) -> Response:
    return error_response(as_api_error(error), request.scope)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    reasons = {404: f"there is no route {path}", 405: f"{path} does not take {request.method}"}
    told = as_api_error(error)
    told.message = reasons.get(told.status, told.message)
    return error_response(told, request.scope)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_invalid_request(error), request.scope)


def _invalid_request(error: RequestValidationError) -> APIError:
    """All problems of the first invalid field."""
    problems = error.errors()
    first = problems[0]
    source, *path = first["loc"]
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first['ctx']['error']} at {path[0]}")
    if first["type"] == "value_error":  # from our own validators, which write the whole message
        message = str(first["ctx"]["error"])
        return APIError(400, message, param=_named_field(message, error.body))
    if not path:
        return APIError(400, _describe(f"the {source}", first["input"], problems))
    field = str(path[0])
    if first["type"] == "missing" and len(path) == 1:
        return APIError(400, f"{field} is missing: it is required", param=field)
    value = error.body[field] if source == "body" else first["input"]
    of_field = [each for each in problems if each["loc"][:2] == first["loc"][:2]]
    return APIError(400, _describe(field, value, of_field), param=field)


def _named_field(message: str, body: Any) -> str | None:
    """The field of the body that the message starts with, if any."""
    field = message.partition(" ")[0]
    return field if isinstance(body, Mapping) and field in body else None


def _describe(field: str, value: Any, problems: Sequence[Mapping[str, Any]]) -> str:
    """problems: of the value or of its parts; one for each type that the field allows."""
    subjects = ["it" if each["input"] is value else f"{short_repr(each['input'])} in it" for each in problems]
    messages = [each["msg"].replace("Input", subject, 1) for subject, each in zip(subjects, problems, strict=True)]
    return f"{field} is {short_repr(value)}: {', or '.join(dict.fromkeys(messages))}"
