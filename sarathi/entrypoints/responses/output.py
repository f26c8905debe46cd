"""The output of a response: its items and their streaming events."""

import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sarathi.entrypoints.parsing.parts import CallArguments, CallBegin, Part, Reasoning, Text
from sarathi.entrypoints.server.streaming import event

IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"


class OutputStream:
    """Builds items from the parts of an output. Events are numbered from 0."""

    def __init__(self, make_call_id: Callable[[], str]) -> None:
        self.items: list[dict[str, Any]] = []
        self._make_call_id = make_call_id
        self._kind: type[Part] | None = None  # type of the current item
        self._sequence = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        """An event of the response or of one of its items."""
        number, self._sequence = self._sequence, self._sequence + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    def add(self, parts: Iterable[Part]) -> Iterator[bytes]:
        """Add parts. Extends the current item while parts are of its type."""
        for part in parts:
            kind = CallBegin if isinstance(part, CallArguments) else type(part)
            if isinstance(part, CallBegin) or kind is not self._kind:
                yield from self.close(COMPLETED)
                self._kind = kind
                yield from self._begin(part)
            if not isinstance(part, CallBegin):
                yield self._grow(part.text)

    def close(self, status: str) -> Iterator[bytes]:
        """End the current item, if any."""
        if self._kind is None:
            return
        item = self.items[-1]
        if self._kind is CallBegin:
            fields = {"arguments": item["arguments"], "name": item["name"]}
            yield self._of_item("response.function_call_arguments.done", **fields)
        else:
            part, name = item["content"][0], _TEXT_EVENTS[self._kind]
            logprobs: dict[str, Any] = {"logprobs": []} if self._kind is Text else {}
            yield self._of_item(f"response.{name}.done", content_index=0, text=part["text"], **logprobs)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        self._kind = None
        if "status" in item:
            item["status"] = status
        yield self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _begin(self, part: Part) -> Iterator[bytes]:
        item = self._item(part)
        self.items.append(item)
        yield self.event("response.output_item.added", output_index=len(self.items) - 1, item=item)
        if not isinstance(part, CallBegin):
            content: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if isinstance(part, Text):
                content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"] = [content]
            yield self._of_item("response.content_part.added", content_index=0, part=content)

    def _grow(self, text: str) -> bytes:
        item = self.items[-1]
        if self._kind is CallBegin:
            item["arguments"] += text
            return self._of_item("response.function_call_arguments.delta", delta=text)
        assert self._kind is not None
        item["content"][0]["text"] += text
        logprobs: dict[str, Any] = {"logprobs": []} if self._kind is Text else {}
        return self._of_item(f"response.{_TEXT_EVENTS[self._kind]}.delta", content_index=0, delta=text, **logprobs)

    def _item(self, part: Part) -> dict[str, Any]:
        if isinstance(part, CallBegin):
            call = {"call_id": self._make_call_id(), "name": part.name, "arguments": "", "status": IN_PROGRESS}
            return {"type": "function_call", "id": _make_id("fc"), **call}
        if isinstance(part, Reasoning):
            return {"type": "reasoning", "id": _make_id("rs"), "summary": [], "content": []}
        message = {"status": IN_PROGRESS, "role": "assistant", "content": []}
        return {"type": "message", "id": _make_id("msg"), **message}

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        return self.event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)


_TEXT_EVENTS: dict[type[Part], str] = {Text: "output_text", Reasoning: "reasoning_text"}


def _make_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
