"""Anthropic's Messages API."""

from sarathi.entrypoints.anthropic import messages

ROUTERS = (messages.router,)
