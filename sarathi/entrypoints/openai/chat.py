"""POST /v1/chat/completions."""

from collections.abc import Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from sarathi.engine.async_llm import Outputs
from sarathi.engine.outputs import CompletionOutput
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.entrypoints.openai import objects
from sarathi.entrypoints.openai.generation import Changes, Header, UsageCount, last_outputs, numbered, submit
from sarathi.entrypoints.openai.logprobs import chat_logprobs, new_logprobs, prompt_logprobs
from sarathi.entrypoints.openai.messages import AnswerStream, whole_message
from sarathi.entrypoints.openai.protocol import ChatRequest
from sarathi.entrypoints.parsing.turn import Turn
from sarathi.entrypoints.server.context import context_of
from sarathi.entrypoints.server.errors import user_errors
from sarathi.entrypoints.server.streaming import DONE, Events, EventStream, event, json_response, until_disconnected

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Generate the next message of a conversation."""
    context = context_of(request)
    header = Header("chatcmpl", context.check_model(body.model))
    with user_errors("messages", context.max_model_len):
        turn = body.turn(context.model_format)
        params = turn.limited(body.sampling_params())
        prompt = await context.llm.encode_chat(**turn.template_arguments(), **body.template_options())
        submitted = await submit(context, header, [prompt], params, body.priority)
    answer = _Answer(body, header, context.tokenizer, turn, prompt)
    if body.stream:
        return EventStream(answer.chunks(submitted[0]))
    return json_response(await until_disconnected(request.receive, answer.whole(submitted[0])))


class _Answer:
    """The response to one request, complete or in chunks."""

    def __init__(
        self, body: ChatRequest, header: Header, tokenizer: Tokenizer, turn: Turn, prompt: Sequence[int]
    ) -> None:
        self._body = body
        self._header = header
        self._tokenizer = tokenizer
        self._turn, self._prompt = turn, prompt

    async def whole(self, outputs: Outputs) -> objects.ChatCompletion:
        [output] = await last_outputs([outputs])
        count = UsageCount()
        count.take(0, output)
        choices = [self._choice(each) for each in output.outputs]
        header, in_prompt = self._header, prompt_logprobs(output)
        return objects.ChatCompletion(
            header.id, header.created, header.model, choices, count.usage(),
            prompt_logprobs=UNSET if in_prompt is None else in_prompt,
        )  # fmt: skip

    async def chunks(self, outputs: Outputs) -> Events:
        """The first chunk of each choice has the role, the last one the finish reason."""
        n = self._body.n or 1
        usage, count, changes = self._body.usage, UsageCount(), Changes(n)
        streams = [AnswerStream(self._turn.parser(self._tokenizer, self._prompt), self._turn.format) for _ in range(n)]
        async with aclosing(numbered([outputs])) as all_outputs:
            async for number, output in all_outputs:
                count.take(number, output)
                for each, num_old in changes.of(output):
                    chunk = self._chunk([self._chunk_choice(each, num_old, streams[each.index])])
                    if usage.continuous_usage_stats:
                        chunk.usage = count.usage()
                    yield event(chunk)
        if usage.include_usage:
            last = self._chunk([])
            last.usage = count.usage()
            yield event(last)
        yield DONE

    def _choice(self, output: CompletionOutput) -> objects.ChatChoice:
        parser = self._turn.parser(self._tokenizer, self._prompt)
        answer = parser.whole(output.text, output.finish_reason != "stop")
        reason = "tool_calls" if answer.calls and output.finish_reason == "stop" else output.finish_reason
        message = whole_message(answer, self._turn.format)
        return objects.ChatChoice(output.index, message, reason, self._logprobs(output, 0), output.stop_reason)

    def _chunk(self, choices: list[objects.ChatChunkChoice]) -> objects.ChatChunk:
        header, usage = self._header, None if self._body.usage.include_usage else UNSET
        return objects.ChatChunk(header.id, header.created, header.model, choices, usage)

    def _chunk_choice(self, output: CompletionOutput, num_old: int, stream: AnswerStream) -> objects.ChatChunkChoice:
        delta = stream.delta(output)
        delta.role = None if num_old else "assistant"
        reason = stream.finish_reason(output)
        choice = objects.ChatChunkChoice(output.index, delta, self._logprobs(output, num_old), reason)
        if output.finished:
            choice.stop_reason = output.stop_reason
        return choice

    def _logprobs(self, output: CompletionOutput, num_old: int) -> objects.ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(new_logprobs(output, num_old), self._body.top_logprobs or 0, self._tokenizer)
