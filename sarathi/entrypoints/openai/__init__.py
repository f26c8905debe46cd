"""OpenAI's API, with vLLM's additional fields and routes."""

from sarathi.entrypoints.openai import chat, completions, models, tokenize

ROUTERS = (chat.router, completions.router, models.router, tokenize.router)
