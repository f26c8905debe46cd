"""The ASGI application: the routers of all APIs, one context, and the middleware in front."""

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from sarathi import __version__
from sarathi.config.server import ServerConfig
from sarathi.entrypoints.server import health, page
from sarathi.entrypoints.server.admin import admin_router
from sarathi.entrypoints.server.context import ServerContext
from sarathi.entrypoints.server.errors import APIFamily, add_error_handlers
from sarathi.entrypoints.server.middleware import ApiKeys, BodyLimit, ErrorFormats, RequestId


def create_app(context: ServerContext, config: ServerConfig, routers: Sequence[APIRouter]) -> FastAPI:
    """An application with `routers` and the routes about the server itself."""
    app = FastAPI(
        title="sarathi", version=__version__, description="Language models over OpenAI-compatible HTTP.",
        middleware=_middleware(config, routers),
    )  # fmt: skip
    app.state.context = context
    add_error_handlers(app)
    for router in (health.router, page.router, admin_router(config), *routers):
        app.include_router(router)
    return app


def with_middleware(app: ASGIApp, config: ServerConfig, routers: Sequence[APIRouter]) -> ASGIApp:
    """Wrap `app` in the middleware of `create_app`. routers: of the APIs that the application serves."""
    for each in reversed(_middleware(config, routers)):
        app = each.cls(app, *each.args, **each.kwargs)
    return app


def _middleware(config: ServerConfig, routers: Sequence[APIRouter]) -> list[Middleware]:
    """Outermost first."""
    families = [each for each in routers if isinstance(each, APIFamily)]
    layers = [Middleware(ErrorFormats, families=families), Middleware(RequestId)]
    if origins := config.origins():
        layers.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
    if keys := config.api_keys():
        layers.append(Middleware(ApiKeys, keys=keys))
    limit = Middleware(BodyLimit, max_bytes=config.max_body_bytes, timeout_s=config.receive_timeout_s)
    return [*layers, limit]
