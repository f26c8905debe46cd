"""The routes of all APIs."""

from sarathi.entrypoints import anthropic, openai, responses

ROUTERS = (*openai.ROUTERS, *responses.ROUTERS, *anthropic.ROUTERS)
