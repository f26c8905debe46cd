"""Text to token ids and back, one id at a time if need be."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from sarathi.engine.tokenizer.chat_template import (
    ChatRenderer,
    ChatTemplateError,
    Conversation,
    jinja_renderer,
    normalize,
)
from sarathi.model_executor.loader.reading import reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnencodableTextError(ValueError):
    """Text that UTF-8 cannot write; the message is which character, and where."""


class Tokenizer:
    """A thin wrapper: encode, decode, the bytes of one token, and the chat template."""

    def __init__(
        self,
        backend: "Backend",
        eos_token_ids: Collection[int] = (),
        render_chat: ChatRenderer | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.eos_token_ids = frozenset(eos_token_ids)
        self._backend = backend
        self.chat_template = chat_template
        self._render_chat = render_chat
        self._added = backend.get_added_tokens_decoder()
        self._to_bytes = _piece_to_bytes(backend)
        self.token_bytes: Callable[[int], bytes] = cache(self._find_bytes)

    @property
    def backend(self) -> "Backend":
        """The object of the tokenizers library that it wraps."""
        return self._backend

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, after the beginning-of-sequence token where the model wants one.

        UnencodableTextError for a lone surrogate, as `json.loads` and file names can bring; ValueError where the
        tokenizer's own rules fail, which those of a broken file may do on some texts alone.
        """
        if not text.isascii():
            _check_encodable(text)
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException:
            with reading("the model", "tokenizer"):
                raise

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of all `token_ids` at once."""
        with reading("the model", "tokenizer"):
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def special_bytes(self, token_id: int) -> bytes:
        """The text of a special token where it is shown, with the space that the tokenizer puts before it, if any;
        empty for any other token."""
        token = self._added.get(token_id)
        return self._to_bytes(token_id, token.content) if token is not None and token.special else b""

    def special_id(self, text: str) -> int | None:
        """The special token of this text."""
        ids = (token_id for token_id, token in self._added.items() if token.special and token.content == text)
        return next(ids, None)

    def piece(self, token_id: int) -> str:
        """The token as something to show: special tokens by name, half characters as U+FFFD."""
        if token_id in self._added:
            return self._added[token_id].content
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def encode_chat(
        self, conversation: Conversation, chat_template: str | None = None, add_generation_prompt: bool = True,
        continue_final_message: bool = False, tools: Sequence[Any] | None = None, **template_names: Any,
    ) -> list[int]:  # fmt: skip
        """Ids of the conversation in the model's own format, up to where the assistant's answer begins.

        For the options see `LLM.chat`; template_names: variables of the template.
        """
        messages = normalize(conversation)
        options: dict[str, Any] = {"tools": None if tools is None else list(tools), **template_names}
        if chat_template is not None:
            options["chat_template"] = chat_template
        elif self._render_chat is None:
            raise ChatTemplateError("this model has no chat template: give one, or use generate() with a text prompt")
        render = self._render_chat or jinja_renderer(None, {})
        text = render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **options,
        )
        try:
            return self.encode(text, add_special_tokens=False)  # the template writes them
        except UnencodableTextError as error:
            raise ChatTemplateError(f"the conversation holds {error}") from None

    def _find_bytes(self, token_id: int) -> bytes:
        """What this token adds to a text that has already begun; empty for special tokens and ids without a piece.

        Bytes of successive tokens joined and read as UTF-8 are the text; a single token may hold half a character.
        """
        if token_id in self._added:
            token = self._added[token_id]
            return b"" if token.special else token.content.encode()
        try:
            piece = self._backend.id_to_token(token_id)
            return b"" if piece is None else self._to_bytes(token_id, piece)
        except BaseException:
            with reading("the model", "tokenizer"):
                raise


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise UnencodableTextError(f"{character!r} at {error.start}: a lone surrogate is no character") from None


def _piece_to_bytes(backend: "Backend") -> Callable[[int, str], bytes]:
    """How this tokenizer writes bytes: as GPT-2's stand-in characters, or as text with `<0xE2>` for lone bytes."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    kinds = {part["type"] for part in state.get("decoders", [state]) if "type" in part}
    return _stand_ins_to_bytes if "ByteLevel" in kinds else _TextPieces(backend, "ByteFallback" in kinds)


def _stand_ins_to_bytes(_token_id: int, piece: str) -> bytes:
    try:
        return bytes(_STAND_INS[char] for char in piece)
    except KeyError:
        return piece.encode()


def _stand_ins() -> dict[str, int]:
    """GPT-2 writes each byte as one visible character: itself if visible, else the next one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + at): byte for at, byte in enumerate(hidden)}


_STAND_INS = _stand_ins()


class _TextPieces:
    """Bytes of pieces whose text depends on whether something stands before them: decoded after an anchor token."""

    def __init__(self, backend: "Backend", byte_fallback: bool) -> None:
        self._backend = backend
        self._byte_fallback = byte_fallback
        self._anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = backend.decode(self._anchor)

    def __call__(self, token_id: int, piece: str) -> bytes:
        lone_byte = _BYTE_PIECE.fullmatch(piece) if self._byte_fallback else None
        if lone_byte:
            return bytes([int(lone_byte.group(1), 16)])
        text: str = self._backend.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text).encode()
