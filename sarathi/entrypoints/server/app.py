"""The application: routers of the APIs over one context."""

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI

from sarathi import __version__
from sarathi.entrypoints.server import health
from sarathi.entrypoints.server.context import ServerContext
from sarathi.entrypoints.server.errors import add_error_handlers


def create_app(context: ServerContext, routers: Sequence[APIRouter]) -> FastAPI:
    """An application with the routes about the server itself, and `routers`."""
    app = FastAPI(title="sarathi", version=__version__, description="Language models over OpenAI-compatible HTTP.")
    app.state.context = context
    add_error_handlers(app)
    for router in (health.router, *routers):
        app.include_router(router)
    return app
