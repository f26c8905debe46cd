"""Conversations to prompt text through a model's Jinja template; knows no tokenizer and no model.

Templates come with model files, so they run in Jinja's sandbox. The names they may call (`raise_exception`,
`strftime_now`, the `tojson` filter) are the ones that templates on the hub rely on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
Conversation = Sequence[Message]
ChatRenderer = Callable[[Conversation], str]
"""Messages to the prompt text, up to where the assistant's answer begins."""


class ChatTemplateError(ValueError):
    """The template refused the conversation, or the conversation is not one."""


def jinja_renderer(template: str, special_tokens: Mapping[str, str]) -> ChatRenderer:
    """A renderer over `template`; `special_tokens` are what it may print by name, as `bos_token`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    compiled = environment.from_string(template)

    def render(conversation: Conversation) -> str:
        try:
            return compiled.render(messages=list(conversation), add_generation_prompt=True, **special_tokens)
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses this conversation: {error}") from error

    return render


def normalize(conversation: Conversation) -> list[dict[str, Any]]:
    """Messages with plain string content. Content may be a list of `{"type": "text", "text": ...}` parts."""
    if isinstance(conversation, (str, Mapping)) or not conversation:
        raise ChatTemplateError(f"a conversation is a non-empty list of messages, got {conversation!r}")
    return [_normalize_message(message, at) for at, message in enumerate(conversation)]


def _normalize_message(message: Message, at: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ChatTemplateError(f'message {at} must be {{"role": ..., "content": ...}}, got {message!r}')
    return {**message, "content": _text(message["content"], at)}


def _text(content: Any, at: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return "".join(str(part.get("text", "")) for part in content)
    raise ChatTemplateError(f"content of message {at} must be text or a list of text parts, got {content!r}")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text"


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
