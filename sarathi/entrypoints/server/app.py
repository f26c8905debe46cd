"""The application: routers of the APIs over one context, behind the middleware."""

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from sarathi import __version__
from sarathi.config.server import ServerConfig
from sarathi.entrypoints.server import health, page
from sarathi.entrypoints.server.admin import admin_router
from sarathi.entrypoints.server.context import ServerContext
from sarathi.entrypoints.server.errors import add_error_handlers
from sarathi.entrypoints.server.middleware import ApiKeys, BodyLimit, RequestId


def create_app(context: ServerContext, config: ServerConfig, routers: Sequence[APIRouter]) -> FastAPI:
    """An application with the routes about the server itself, and `routers`."""
    app = FastAPI(title="sarathi", version=__version__, description="Language models over OpenAI-compatible HTTP.")
    app.state.context = context
    add_error_handlers(app)
    _add_middleware(app, config)
    for router in (health.router, page.router, admin_router(config), *routers):
        app.include_router(router)
    return app


def _add_middleware(app: FastAPI, config: ServerConfig) -> None:
    """The last one added is the outermost."""
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, timeout_s=config.receive_timeout_s)
    if keys := config.api_keys():
        app.add_middleware(ApiKeys, keys=keys)
    if origins := config.origins():
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestId)
