"""Conversations to prompt text through a model's Jinja template; knows no model.

Templates come with model files and are written against transformers, so it is transformers that runs them, in its
sandbox: what they may call, and what else they find (`tools` is none, `{% generation %}`), is what it says.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from sarathi.containers import is_list

Message = Mapping[str, Any]
Conversation = Sequence[Message]
ChatRenderer = Callable[[Conversation], str]
"""Messages to the prompt text, up to where the assistant's answer begins."""


class ChatTemplateError(ValueError):
    """The template refused the conversation, or the conversation is not one."""


def tokenizer_renderer(tokenizer: Any, **names: Any) -> ChatRenderer:
    """A renderer over the template of a tokenizer of transformers; `names` go to its apply_chat_template.

    It raises ChatTemplateError for whatever the template raises, and where it is no valid template.
    """

    def render(conversation: Conversation) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                list(conversation), tokenize=False, add_generation_prompt=True, **names
            )
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            message = f"the model's chat template failed with {type(error).__name__}: {error}"
            raise ChatTemplateError(message) from error
        return text

    return render


def jinja_renderer(template: str, special_tokens: Mapping[str, str]) -> ChatRenderer:
    """A renderer over `template`, which is first looked at when there is a conversation; otherwise as above.

    special_tokens: what it may print by name, as `bos_token`.
    """

    def render(conversation: Conversation) -> str:
        return tokenizer_renderer(_bare_tokenizer(), chat_template=template, **special_tokens)(conversation)

    return render


@cache
def _bare_tokenizer() -> Any:
    """A tokenizer without tokens: that is how transformers' public interface takes a template by itself."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast  # half a second, for those who chat

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))  # type: ignore[no-untyped-call]


def normalize(conversation: Conversation) -> list[dict[str, Any]]:
    """Messages with plain string content. Content may be a list of `{"type": "text", "text": ...}` parts."""
    if not is_list(conversation) or not len(conversation):
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
