"""POST /v1/messages and /v1/messages/count_tokens."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from sarathi.engine.async_llm import Outputs
from sarathi.entrypoints.anthropic.blocks import BlockStream, content_blocks, ending, make_message, make_usage
from sarathi.entrypoints.anthropic.errors import error_body, error_event
from sarathi.entrypoints.anthropic.protocol import CountRequest, MessagesRequest
from sarathi.entrypoints.openai.generation import Header, last_outputs, numbered, submit
from sarathi.entrypoints.parsing.answer_parser import AnswerParser
from sarathi.entrypoints.parsing.turn import Turn
from sarathi.entrypoints.server.context import ServerContext, context_of
from sarathi.entrypoints.server.errors import APIFamily, user_errors
from sarathi.entrypoints.server.streaming import Events, EventStream, event, json_response, until_disconnected

router = APIFamily("/v1/messages", error_body, tags=["Anthropic"])


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Generate the next message of a conversation."""
    context = context_of(request)
    header = Header("msg", context.check_model(body.model), "_")
    with user_errors("messages", context.max_model_len):
        turn = body.turn(context.model_format)
        params = turn.limited(body.sampling_params())
        prompt = await _encode(context, body, turn)
        [outputs] = await submit(context, header, [prompt], params, None)
    answer = _Answer(header, turn.parser(context.tokenizer, prompt), len(prompt))
    if body.stream:
        return EventStream(answer.events(outputs), error_event=error_event)
    return json_response(await until_disconnected(request.receive, answer.whole(outputs)))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
    """Number of prompt tokens of a conversation."""
    context = context_of(request)
    context.check_model(body.model)
    with user_errors("messages", context.max_model_len):
        prompt = await _encode(context, body, body.turn(context.model_format))
    return {"input_tokens": len(prompt)}


async def _encode(context: ServerContext, body: CountRequest, turn: Turn) -> Sequence[int]:
    return await context.llm.encode_chat(**turn.template_arguments(), **body.template_options(context.model_format))


class _Answer:
    """The response to one request, complete or as events."""

    def __init__(self, header: Header, parser: AnswerParser, input_tokens: int) -> None:
        self._header, self._parser, self._input_tokens = header, parser, input_tokens

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        [output] = [each.outputs[0] for each in await last_outputs([outputs])]
        answer = self._parser.whole(output.text, output.finish_reason != "stop")
        usage = make_usage(self._input_tokens, output.num_tokens)
        return {
            **make_message(self._header.id, self._header.model, self._input_tokens),
            "content": content_blocks(answer), **ending(output, bool(answer.calls)), "usage": usage,
        }  # fmt: skip

    async def events(self, outputs: Outputs) -> Events:
        """message_start, the content blocks, message_delta with the stop reason, message_stop."""
        message = make_message(self._header.id, self._header.model, self._input_tokens)
        yield event({"type": "message_start", "message": message}, "message_start")
        blocks = BlockStream()
        async with aclosing(numbered([outputs])) as all_outputs:
            async for _, output in all_outputs:
                newest = output.outputs[0]
                is_cut = newest.finish_reason != "stop"
                for each in blocks.events(self._parser.push(newest.delta, newest.finished, is_cut)):
                    yield each
        for each in blocks.end():
            yield each
        usage = {"input_tokens": self._input_tokens, "output_tokens": newest.num_tokens}
        end = {**ending(newest, blocks.has_calls), "stop_details": None, "container": None}
        yield event({"type": "message_delta", "delta": end, "usage": usage}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")
