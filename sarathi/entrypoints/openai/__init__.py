"""OpenAI's API, with the fields and routes that vLLM adds to it."""

from sarathi.entrypoints.openai import chat, completions, models, tokenize

ROUTERS = (chat.router, completions.router, models.router, tokenize.router)
