"""OpenAI's Responses API."""

from sarathi.entrypoints.responses import routes

ROUTERS = (routes.router,)
