"""Routes about the server itself: /health, /ping, /ready, /version, /load, /metrics."""

from fastapi import APIRouter, Request, Response

from sarathi import __version__
from sarathi.entrypoints.server.context import context_of
from sarathi.entrypoints.server.errors import APIError, as_api_error, error_response

router = APIRouter(tags=["server"])


@router.get("/health")
@router.get("/ping")
@router.post("/ping")
async def get_health(request: Request) -> Response:
    """200 while the engine process is alive, else 503."""
    error = context_of(request).llm.error
    return Response() if error is None else error_response(as_api_error(error), request.scope)


@router.get("/ready")
async def get_ready(request: Request) -> Response:
    """200 while the server accepts requests; 503 if the engine is dead or the server is draining."""
    if context_of(request).is_draining:
        raise APIError(503, "the server is draining", "service_unavailable_error", code="draining")
    return await get_health(request)


@router.get("/version")
async def get_version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/load")
async def get_load(request: Request) -> dict[str, int]:
    """Number of requests in the server, under vLLM's name."""
    return {"server_load": context_of(request).llm.num_unfinished}


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format. If the engine process does not respond, its last values are repeated."""
    context = context_of(request)
    await context.metrics.refresh(context.llm)
    content, media_type = context.metrics.expose()
    return Response(content, headers={"Content-Type": media_type})
