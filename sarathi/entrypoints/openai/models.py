"""GET /v1/models and /v1/models/{name}."""

from typing import Any

from fastapi import APIRouter, Request

from sarathi.entrypoints.server.context import ServerContext, context_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All names of the model."""
    context = context_of(request)
    return {"object": "list", "data": [_card(context, name) for name in context.model_names]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """One name; status 404 if unknown."""
    context = context_of(request)
    return _card(context, context.check_model(name))


def _card(context: ServerContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.created_s,
        "owned_by": "sarathi",
        "root": context.root,
        "parent": None,
        "max_model_len": context.max_model_len,
    }
