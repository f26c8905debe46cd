"""Routes that change the running server and need an admin key: /kv/budget, /sleep, /wake_up and
/reset_prefix_cache."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sarathi.config.server import ServerConfig
from sarathi.entrypoints.server.context import context_of
from sarathi.entrypoints.server.errors import APIError
from sarathi.entrypoints.server.middleware import holds_key


class BudgetRequest(BaseModel):
    """memory_bytes: size of the KV cache, summed over ranks."""

    model_config = ConfigDict(strict=True)
    memory_bytes: Annotated[int, Field(ge=1, lt=2**62)]


def admin_router(config: ServerConfig) -> APIRouter:
    """Routes that require one of the configured admin keys."""
    keys = [key.encode() for key in config.admin_keys()]

    async def check_key(request: Request) -> None:
        if not holds_key(request.headers, keys):
            raise APIError(403, "this route requires one of the keys in SARATHI_ADMIN_KEYS", code="admin_key_needed")

    router = APIRouter(tags=["admin"], dependencies=[Depends(check_key)])
    router.add_api_route("/kv/budget", set_budget, methods=["POST"])
    router.add_api_route("/sleep", sleep, methods=["POST"])
    router.add_api_route("/wake_up", wake_up, methods=["POST"])
    router.add_api_route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"])
    return router


async def set_budget(body: BudgetRequest, request: Request) -> Response:
    """Resize the KV cache. If it shrinks, requests wait or are preempted."""
    try:
        await context_of(request).llm.set_cache_budget(body.memory_bytes)
    except ValueError as error:
        raise APIError(400, str(error), param="memory_bytes") from None
    return Response()


async def sleep(request: Request, level: int = 1) -> Response:
    """Release memory while requests wait. level: 1: the KV cache; 2: the KV cache and the weights."""
    try:
        await context_of(request).llm.sleep(level)
    except ValueError as error:
        raise APIError(400, str(error), param="level") from None
    return Response()


async def wake_up(request: Request) -> Response:
    """Allocate the memory again and resume the requests."""
    try:
        await context_of(request).llm.wake_up()
    except ValueError as error:
        raise APIError(500, f"the server is still asleep: {error}", "server_error") from None
    return Response()


async def reset_prefix_cache(request: Request) -> Response:
    """Drop the cached prefixes, for example after the weights changed."""
    if not await context_of(request).llm.reset_prefix_cache():
        raise APIError(409, "requests are running: try again when all have finished")
    return Response()
