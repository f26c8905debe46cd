"""Response objects of OpenAI's API, encoded by msgspec."""

from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

from sarathi import __version__

_FINGERPRINT = f"sarathi-{__version__}"  # lets clients detect changes of the server


class PromptTokensDetails(Struct):
    """cached_tokens: prompt tokens found in the prefix cache."""

    cached_tokens: int = 0


class Usage(Struct):
    """Token counts over all prompts and completions of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = field(default_factory=PromptTokensDetails)


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct):
    """One entry per token."""

    content: list[ChosenLogprob]
    refusal: None = None


class CalledFunction(Struct, omit_defaults=True):
    """arguments: JSON text, or the next part of it."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(Struct):
    id: str
    function: CalledFunction
    type: str = "function"


class ToolCallDelta(Struct, omit_defaults=True):
    """The first delta of a call has id and type."""

    index: int
    function: CalledFunction
    id: str | None = None
    type: str | None = None


class Message(Struct):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    annotations: list[Any] = []
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: Message
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    stop_reason: int | str | None = None


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    service_tier: str = "default"
    system_fingerprint: str = _FINGERPRINT
    prompt_logprobs: list[Any] | UnsetType | None = UNSET


class Delta(Struct, omit_defaults=True):
    """The part of a message that a chunk adds."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"
    service_tier: str = "default"
    system_fingerprint: str = _FINGERPRINT


class TextLogprobs(Struct):
    """Each list has one entry per token; text_offset is in characters from the start of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[Any] | UnsetType | None = UNSET


class TextCompletion(Struct):
    """A completion, or a chunk of one."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"
    system_fingerprint: str = _FINGERPRINT
