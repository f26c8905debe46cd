"""Conversations to prompt text through a model's Jinja template.

Templates come with model files and are written against transformers, so transformers runs them, in its sandbox.
"""

import ctypes
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from sarathi.containers import is_list
from sarathi.wording import short_repr

_IMPORTING = threading.Lock()
_TIME_LIMIT_S = 10.0  # of one rendering: the sandbox bounds each loop, but no loop of loops

Message = Mapping[str, Any]
Conversation = Sequence[Message]
ChatRenderer = Callable[..., str]
"""Messages and options of transformers' apply_chat_template, by name, to the prompt text."""


class ChatTemplateError(ValueError):
    """The template refused the conversation, or the conversation is not one."""


class TemplateTimeoutError(TimeoutError):
    """A template ran for too long."""

    def __str__(self) -> str:
        return f"it ran longer than {_TIME_LIMIT_S:g} s"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TemplateTimeoutError in this thread, between two instructions of Python, once the seconds have passed."""
    thread_id, lock, is_over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(TemplateTimeoutError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
        timer.cancel()  # a call of Python: an exception that is due is raised here at the latest


def tokenizer_renderer(tokenizer: Any, **names: Any) -> ChatRenderer:
    """A renderer over the template of a tokenizer of transformers; `names` go to its apply_chat_template.

    It raises ChatTemplateError for whatever the template raises, and where it is no valid template.
    """

    def render(conversation: Conversation, **options: Any) -> str:
        try:
            given = {"add_generation_prompt": True, **names, **options}
            with _time_limit(_TIME_LIMIT_S):
                text: str = tokenizer.apply_chat_template(list(conversation), tokenize=False, **given)
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            message = f"the chat template failed with {type(error).__name__}: {error}"
            raise ChatTemplateError(message) from error
        return text

    return render


def jinja_renderer(template: str | None, special_tokens: Mapping[str, str]) -> ChatRenderer:
    """A renderer over `template`, which is first looked at when there is a conversation; otherwise as above.

    special_tokens: what it may print by name, as `bos_token`.
    """

    def render(conversation: Conversation, **options: Any) -> str:
        return tokenizer_renderer(_bare_tokenizer(), chat_template=template, **special_tokens)(conversation, **options)

    return render


@cache
def _bare_tokenizer() -> Any:
    """A tokenizer without tokens: transformers' public interface renders a template through a tokenizer only."""
    from tokenizers import Tokenizer, models

    return _of_transformers("PreTrainedTokenizerFast")(tokenizer_object=Tokenizer(models.BPE()))


def _of_transformers(name: str) -> Any:
    """A class of transformers, which takes half a second the first time.

    Threads come one after another: the package imports its parts when they are asked for, and fails where two ask.
    """
    with _IMPORTING:
        import transformers

        return getattr(transformers, name)


def check_template_names(names: Mapping[str, Any]) -> None:
    """ValueError for a name that is an option of apply_chat_template and no variable of a template."""
    if not names:
        return
    options = inspect.signature(_of_transformers("PreTrainedTokenizerBase").apply_chat_template).parameters
    taken = names.keys() & options.keys()
    for name in sorted(taken):
        raise ValueError(f"chat_template_kwargs holds {name!r}: it must hold variables of the chat template only")


def normalize(conversation: Conversation) -> list[dict[str, Any]]:
    """Messages with plain string content. Content may be a list of `{"type": "text", "text": ...}` parts, which are
    joined by newlines, as in vLLM; beside `tool_calls` it may be None or absent. Arguments of tool calls are objects,
    as templates expect them: JSON text of them is read."""
    if not is_list(conversation) or not len(conversation):
        raise ChatTemplateError(f"a conversation is a non-empty list of messages, got {short_repr(conversation)}")
    return [_normalize_message(message, at) for at, message in enumerate(conversation)]


def _normalize_message(message: Message, at: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatTemplateError(f'message {at} must be {{"role": ..., "content": ...}}, got {short_repr(message)}')
    calls = message.get("tool_calls")
    if calls:
        content = message.get("content") or ""
        return {**message, "content": _text(content, at), "tool_calls": [_tool_call(call, at) for call in calls]}
    if "content" not in message:
        raise ChatTemplateError(f'message {at} must be {{"role": ..., "content": ...}}, got {short_repr(message)}')
    return {**message, "content": _text(message["content"], at)}


def _tool_call(call: Any, at: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatTemplateError(
            f'a tool call of message {at} must be {{"function": {{"name": ..., "arguments": ...}}}}, '
            f"got {short_repr(call)}"
        )
    arguments = function.get("arguments") or {}
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError as error:
        raise ChatTemplateError(f"arguments of a tool call of message {at} are no JSON: {error}") from None
    return {**call, "function": {**function, "arguments": read}}


def _text(content: Any, at: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return "\n".join(str(part.get("text", "")) for part in content)
    raise ChatTemplateError(f"content of message {at} must be text or a list of text parts, got {short_repr(content)}")
