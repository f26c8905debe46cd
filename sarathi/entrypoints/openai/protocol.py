"""Request bodies of OpenAI's API. Unknown fields are ignored, null means the default, types are strict."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sarathi.entrypoints.parsing.tools import read_choice, read_tools
from sarathi.entrypoints.parsing.turn import ModelFormat, Turn
from sarathi.sampling_params import SamplingParams
from sarathi.structured_outputs import StructuredOutputsParams
from sarathi.wording import short_repr

_FIRST_ERROR = Field(fail_fast=True)  # a body can hold a million of them
TokenIds = Annotated[list[int], _FIRST_ERROR]
Prompts = str | TokenIds | Annotated[list[str], _FIRST_ERROR] | Annotated[list[TokenIds], _FIRST_ERROR]
_MOST_LOGPROBS = 20
Logprobs = Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)]
_SAME_NAMES = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "logit_bias", "prompt_logprobs", "bad_words",
    "allowed_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
    "cache_salt",
)  # fmt: skip


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    """include_usage: send token counts in a last chunk. continuous_usage_stats: and in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(Body):
    """Fields of chat and text completions; for the sampling fields see SamplingParams."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: Logprobs | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    cache_salt: str | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given: it needs stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError(f"prompt_logprobs is {self.prompt_logprobs}: it needs stream=false")
        return self

    @property
    def usage(self) -> StreamOptions:
        """The stream options, or their defaults."""
        return self.stream_options or StreamOptions()

    def limit(self) -> StructuredOutputsParams | None:
        """The structure that the output must have. ValueError if several are given, or one is invalid."""
        given = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        limits: dict[str, Any] = {f"guided_{name}": {name: value} for name, value in given.items() if value is not None}
        limits["structured_outputs"] = self.structured_outputs
        limits["response_format"] = read_response_format(self.response_format)
        wanted = {name: limit for name, limit in limits.items() if limit is not None}
        if len(wanted) > 1:
            raise ValueError(f"{' and '.join(wanted)} are given: only one may say what the output looks like")
        return StructuredOutputsParams.of(next(iter(wanted.values()), None))

    def _params(self, **others: Any) -> SamplingParams:
        """ValueError where a value is not allowed."""
        given = {name: getattr(self, name) for name in _SAME_NAMES}
        return SamplingParams(**{name: value for name, value in given.items() if value is not None}, **others)


def read_response_format(wanted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's response_format as fields of StructuredOutputsParams."""
    kind = None if wanted is None else wanted.get("type")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise ValueError(f"response_format.type is {short_repr(kind)}: it must be text, json_object or json_schema")
    inner = wanted.get("json_schema", wanted)  # the Responses API has no inner object
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ValueError(f"response_format.json_schema.schema is {short_repr(schema)}: it must be a JSON schema")
    return {"json": schema}


Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]


class TemplateBody(Body):
    """Options of the chat template; see `encode_chat` of the input processor."""

    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def template_options(self) -> Mapping[str, Any]:
        """Options of `AsyncLLM.encode_chat`, apart from the tools."""
        names = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        return {name: getattr(self, name) for name in names}


class ChatRequest(SamplingBody, TemplateBody):
    """POST /v1/chat/completions. max_completion_tokens overrides max_tokens, its older name."""

    model: str
    messages: Messages
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}: it needs logprobs=true")
        return self

    def turn(self, model_format: ModelFormat) -> Turn:
        """The conversation with its tools. Raises ValueError."""
        tools = read_tools(self.tools)
        choice = read_choice(self.tool_choice, tools)
        return Turn(model_format, self.messages, tools, choice, self.parallel_tool_calls is False, self.limit())

    def sampling_params(self) -> SamplingParams:
        """ValueError where a value is not allowed."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(max_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(SamplingBody):
    """POST /v1/completions. With echo, max_tokens may be 0: the response is the prompt with its logprobs."""

    prompt: Prompts
    logprobs: Logprobs | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_refused(self) -> "CompletionRequest":
        if self.suffix:
            raise ValueError("suffix is given: this server does not support insertion")
        if self.best_of not in (None, 1, self.n):
            raise ValueError(f"best_of is {self.best_of}: this server returns all completions, so it must equal n")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts. A list of integers is one prompt."""
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else self.prompt  # type: ignore[return-value]

    @property
    def is_prompt_only(self) -> bool:
        """Whether the response has no output token: one is generated and dropped."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_params(self) -> SamplingParams:
        """ValueError where a value is not allowed."""
        most = {} if self.max_tokens is None else {"max_tokens": 1 if self.is_prompt_only else self.max_tokens}
        echoed = {"prompt_logprobs": self.logprobs} if self.echo and self.prompt_logprobs is None else {}
        return self._params(**most, logprobs=self.logprobs, structured_outputs=self.limit(), **echoed)


class TokenizeRequest(TemplateBody):
    """POST /tokenize. Either prompt or messages must be given."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
