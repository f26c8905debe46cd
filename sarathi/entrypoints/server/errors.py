"""Errors as clients see them: a status, and a JSON object in OpenAI's form or in that of the API whose route it is."""

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
    """status: of HTTP. type, param, code: as OpenAI's errors have them."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer in OpenAI's form."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self, form: "ErrorBody | None" = None) -> Response:
        """The answer. form: what makes its JSON object; None: OpenAI's."""
        content = msgspec.json.encode(self.body() if form is None else form(self))
        return Response(content, self.status, self.headers, media_type="application/json")


ErrorBody = Callable[[APIError], dict[str, Any]]


class APIFamily(APIRouter):
    """Routes at a path and below it, whose errors have a form of their own, wherever they come from."""

    def __init__(self, path: str, error_body: ErrorBody, **settings: Any) -> None:
        super().__init__(**settings)
        self.path = path
        self.error_body = error_body

    def has(self, path: str) -> bool:
        """Whether a path is one of the family's, also where no route has it."""
        return path == self.path or path.startswith(f"{self.path}/")


class RequestFailedError(RuntimeError):
    """The engine ended one request alone, for what its message says."""


class ClientDisconnectedError(ConnectionError):
    """Nobody reads the answer any more."""


@contextmanager
def user_errors(prompt_field: str, max_model_len: int) -> Iterator[None]:
    """ValueErrors become answers with status 400. prompt_field: the name of what may be too long."""
    try:
        yield
    except RequestTooLongError as error:
        message = f"This model's maximum context length is {max_model_len} tokens. However, {error}."
        raise APIError(400, message, param=prompt_field, code="context_length_exceeded") from None
    except ValueError as error:
        field = str(error).partition(" ")[0]
        raise APIError(400, str(error), param=field if field in {prompt_field, *_SAMPLING_FIELDS} else None) from None


def check_not_failed(output: RequestOutput) -> None:
    """RequestFailedError where a completion ended with finish reason "error"."""
    for each in output.outputs:
        if each.finish_reason == "error":
            raise RequestFailedError(f"the request failed: {each.stop_reason}")


def as_api_error(error: Exception) -> APIError:
    """What a client is told about any exception. One that nobody expected is logged, and only its type is told."""
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
    """The answer to a request, in the form of the family that its path belongs to, else in OpenAI's."""
    return error.response(scope.get(ERROR_BODY))


def add_error_handlers(app: FastAPI) -> None:
    """Errors of every route, of the router and of validation become answers."""
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
    """All problems of the first field that has one."""
    problems = error.errors()
    first = problems[0]
    source, *path = first["loc"]
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is no JSON: {first['ctx']['error']} at {path[0]}")
    if first["type"] == "value_error":  # raised by a validator of ours, with its whole message
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
    """The field of the body that a message begins with."""
    field = message.partition(" ")[0]
    return field if isinstance(body, Mapping) and field in body else None


def _describe(field: str, value: Any, problems: Sequence[Mapping[str, Any]]) -> str:
    """problems: of the value, or of what it holds; several where a value of several types is allowed."""
    subjects = ["it" if each["input"] is value else f"{short_repr(each['input'])} in it" for each in problems]
    messages = [each["msg"].replace("Input", subject, 1) for subject, each in zip(subjects, problems, strict=True)]
    return f"{field} is {short_repr(value)}: {', or '.join(dict.fromkeys(messages))}"
