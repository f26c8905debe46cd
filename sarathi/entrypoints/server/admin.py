"""Routes that change the running server, for those with an admin key: /kv/budget, /sleep, /wake_up and
/reset_prefix_cache."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sarathi.config.server import ServerConfig
from sarathi.entrypoints.server.context import context_of
from sarathi.entrypoints.server.errors import APIError
from sarathi.entrypoints.server.middleware import holds_key


class BudgetRequest(BaseModel):
    """memory_bytes: of the KV cache, summed over ranks."""

    model_config = ConfigDict(strict=True)
    memory_bytes: Annotated[int, Field(ge=1, lt=2**62)]


def admin_router(config: ServerConfig) -> APIRouter:
    """Routes that refuse every request without one of the configuration's admin keys."""
    keys = [key.encode() for key in config.admin_keys()]

    async def check_key(request: Request) -> None:
        if not holds_key(request.headers, keys):
            raise APIError(403, "this needs one of the keys in SARATHI_ADMIN_KEYS", code="admin_key_needed")

    router = APIRouter(tags=["admin"], dependencies=[Depends(check_key)])
    router.add_api_route("/kv/budget", set_budget, methods=["POST"])
    router.add_api_route("/sleep", sleep, methods=["POST"])
    router.add_api_route("/wake_up", wake_up, methods=["POST"])
    router.add_api_route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"])
    return router


async def set_budget(body: BudgetRequest, request: Request) -> Response:
    """Shrink or grow the KV cache; requests wait or are preempted where there is less."""
    try:
        await context_of(request).llm.set_cache_budget(body.memory_bytes)
    except ValueError as error:
        raise APIError(400, str(error), param="memory_bytes") from None
    return Response()


async def sleep(request: Request, level: int = 1) -> Response:
    """Give memory back to the system; requests wait. level: 1: of the KV cache; 2: of the weights too."""
    try:
        await context_of(request).llm.sleep(level)
    except ValueError as error:
        raise APIError(400, str(error), param="level") from None
    return Response()


async def wake_up(request: Request) -> Response:
    """Take the memory again, and go on with the requests."""
    try:
        await context_of(request).llm.wake_up()
    except ValueError as error:
        raise APIError(500, f"the server goes on sleeping: {error}", "server_error") from None
    return Response()


async def reset_prefix_cache(request: Request) -> Response:
    """Forget the tokens of ended requests, as after a change of weights."""
    if not await context_of(request).llm.reset_prefix_cache():
        raise APIError(409, "a request has not ended: try again when none is running")
    return Response()
