"""Responses of the Messages API: content blocks, complete and as events."""

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from sarathi.engine.outputs import CompletionOutput
from sarathi.entrypoints.parsing.parts import Answer, CallArguments, CallBegin, Part, Reasoning, Text
from sarathi.entrypoints.server.streaming import event

_STOP_REASONS = {"length": "max_tokens", "abort": "end_turn"}


def make_message(message_id: str, model: str, input_tokens: int) -> dict[str, Any]:
    """A message without content: the first event of a stream."""
    return {
        "id": message_id, "type": "message", "role": "assistant", "model": model, "content": [], "stop_reason": None,
        "stop_sequence": None, "stop_details": None, "container": None, "usage": make_usage(input_tokens, 0),
    }  # fmt: skip


def make_usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Token counts; Anthropic's explicit prompt caching is not supported."""
    unused = (
        "cache_creation", "cache_creation_input_tokens", "cache_read_input_tokens", "inference_geo",
        "output_tokens_details", "server_tool_use", "service_tier",
    )  # fmt: skip
    return {**dict.fromkeys(unused), "input_tokens": input_tokens, "output_tokens": output_tokens}


def ending(output: CompletionOutput, has_calls: bool) -> dict[str, Any]:
    """stop_reason and stop_sequence of a finished answer."""
    if output.finish_reason != "stop":
        return {"stop_reason": _STOP_REASONS[str(output.finish_reason)], "stop_sequence": None}
    if isinstance(output.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_reason}
    return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


def content_blocks(answer: Answer) -> list[dict[str, Any]]:
    """Thinking, text and tool calls; an empty text block if there is nothing else."""
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content or not answer.calls:
        blocks.append(_text_block(answer.content))
    blocks += [_call_block(call.name, _read(call.arguments)) for call in answer.calls]
    return blocks


class BlockStream:
    """The events of one message's content blocks."""

    def __init__(self) -> None:
        self.has_calls = False
        self._num_blocks = 0
        self._open: type[Part] | None = None  # type of the current block

    def events(self, parts: Iterable[Part]) -> Iterator[bytes]:
        """Extends the current block while parts are of its type."""
        for part in parts:
            kind = CallBegin if isinstance(part, CallArguments) else type(part)
            if isinstance(part, CallBegin) or kind is not self._open:
                yield from self._close()
                yield self._begin(part)
                self._open = kind
            if not isinstance(part, CallBegin):
                yield self._event("content_block_delta", delta=_delta(part))

    def end(self) -> Iterator[bytes]:
        """Close the last block; a message without blocks gets an empty text."""
        if not self._num_blocks and self._open is None:
            yield self._begin(Text(""))
            self._open = Text
        yield from self._close()

    def _begin(self, part: Part) -> bytes:
        block = _text_block("")
        if isinstance(part, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        elif isinstance(part, CallBegin):
            self.has_calls = True
            block = _call_block(part.name, {})
        return self._event("content_block_start", content_block=block)

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            yield self._event("content_block_stop")
            self._num_blocks += 1
            self._open = None

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event({"type": kind, "index": self._num_blocks, **fields}, kind)


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text_delta", "text": part.text}
    if isinstance(part, Reasoning):
        return {"type": "thinking_delta", "thinking": part.text}
    assert isinstance(part, CallArguments)
    return {"type": "input_json_delta", "partial_json": part.text}


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def _call_block(name: str, arguments: Any) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": f"toolu_{uuid.uuid4().hex[:24]}",
        "name": name,
        "input": arguments,
        "caller": {"type": "direct"},
    }


def _read(arguments: str) -> dict[str, Any]:
    """The arguments as an object; empty if max_tokens cut them off."""
    try:
        read = json.loads(arguments)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
