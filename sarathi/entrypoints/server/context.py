"""State that all routes share: the engine and the names of its model."""

import time
from dataclasses import dataclass, field

from fastapi import Request

from sarathi.engine.async_llm import AsyncLLM
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.entrypoints.parsing.turn import ModelFormat
from sarathi.entrypoints.server.errors import APIError
from sarathi.entrypoints.server.metrics import ServerMetrics


@dataclass
class ServerContext:
    """One for each application.

    model_names: names that clients may use for the model, the main one first. root: the model that was loaded.
    model_format: how the model writes tool calls and reasoning.
    request_timeout_s: time limit of a request; None: no limit.
    id_prefix: prefix of response ids, by which the gateway finds the process that stores a response.
    is_draining: whether the server is shutting down and refuses new requests.
    """

    llm: AsyncLLM
    model_names: tuple[str, ...]
    root: str
    metrics: ServerMetrics
    model_format: ModelFormat
    request_timeout_s: float | None = None
    id_prefix: str = ""
    created_s: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    @property
    def max_model_len(self) -> int:
        return self.llm.facts.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises APIError if the model has none."""
        if self.llm.tokenizer is None:
            raise APIError(400, "this model has no tokenizer: send prompts as token ids to /v1/completions")
        return self.llm.tokenizer

    def check_model(self, name: str | None) -> str:
        """The model name for the response. APIError with status 404 if this server does not serve it."""
        if name is not None and name not in self.model_names:
            message = f"The model {name!r} does not exist: this server has {', '.join(self.model_names)}"
            raise APIError(404, message, param="model", code="model_not_found")
        return name or self.model_name


def context_of(request: Request) -> ServerContext:
    """The context of the application that serves this request."""
    context: ServerContext = request.app.state.context
    return context
