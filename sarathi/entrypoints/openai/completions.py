"""POST /v1/completions."""

from collections.abc import Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from sarathi.engine.async_llm import Outputs
from sarathi.engine.outputs import CompletionOutput, RequestOutput
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.entrypoints.openai.generation import Changes, Header, UsageCount, last_outputs, numbered, submit
from sarathi.entrypoints.openai.logprobs import new_logprobs, prompt_entries, prompt_logprobs, text_logprobs
from sarathi.entrypoints.openai.objects import TextChoice, TextCompletion, TextLogprobs, Usage
from sarathi.entrypoints.openai.protocol import CompletionRequest
from sarathi.entrypoints.server.context import context_of
from sarathi.entrypoints.server.errors import user_errors
from sarathi.entrypoints.server.streaming import DONE, Events, EventStream, event, json_response, until_disconnected

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete one or more prompts."""
    context = context_of(request)
    header = Header("cmpl", context.check_model(body.model))
    with user_errors("prompt", context.max_model_len):
        params, prompts = body.sampling_params(), body.prompts
        if not prompts:
            raise ValueError("prompt is empty: it must hold at least one prompt")
        submitted = await submit(context, header, prompts, params, body.priority)
    answer = _Answer(body, header, context.llm.tokenizer)
    if body.stream:
        return EventStream(answer.chunks(submitted))
    return json_response(await until_disconnected(request.receive, answer.whole(submitted)))


class _Answer:
    """The response to one request, complete or in chunks."""

    def __init__(self, body: CompletionRequest, header: Header, tokenizer: Tokenizer | None) -> None:
        self._body = body
        self._header = header
        self._tokenizer = tokenizer
        self._n = body.n or 1
        self._lengths: dict[int, int] = {}  # characters sent of each choice

    async def whole(self, submitted: Sequence[Outputs]) -> TextCompletion:
        count, choices = UsageCount(), []
        for number, output in enumerate(await last_outputs(submitted)):
            count.take(number, output)
            choices += [self._choice(number, output, each, each.text, 0) for each in output.outputs]
        return self._completion(choices, self._usage(count))

    async def chunks(self, submitted: Sequence[Outputs]) -> Events:
        """The last chunk of each choice has the finish reason."""
        usage, count, changes = self._body.usage, UsageCount(), [Changes(self._n) for _ in submitted]
        absent = None if usage.include_usage else UNSET
        async with aclosing(numbered(submitted)) as outputs:
            async for number, output in outputs:
                count.take(number, output)
                for each, num_old in changes[number].of(output):
                    choice = self._choice(number, output, each, each.delta, num_old)
                    yield event(
                        self._completion([choice], self._usage(count) if usage.continuous_usage_stats else absent)
                    )
        if usage.include_usage:
            yield event(self._completion([], self._usage(count)))
        yield DONE

    def _completion(self, choices: list[TextChoice], usage: Usage | UnsetType | None) -> TextCompletion:
        return TextCompletion(self._header.id, self._header.created, self._header.model, choices, usage)

    def _usage(self, count: UsageCount) -> Usage:
        usage = count.usage()
        return Usage(usage.prompt_tokens, 0, usage.prompt_tokens) if self._body.is_prompt_only else usage

    def _choice(
        self, number: int, output: RequestOutput, each: CompletionOutput, new_text: str, num_old: int
    ) -> TextChoice:
        """num_old: tokens of this completion that were sent before; the first chunk includes the echo."""
        index = number * self._n + each.index
        text = "" if self._body.is_prompt_only else new_text
        if self._body.echo and not num_old:
            text = self._prompt_text(output) + text
        at = self._lengths.get(index, 0)
        self._lengths[index] = at + len(text)
        logprobs = self._logprobs(output, each, num_old, at)
        choice = TextChoice(index, text, logprobs, each.finish_reason, each.stop_reason)
        if self._body.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(output)
        return choice

    def _logprobs(self, output: RequestOutput, each: CompletionOutput, num_old: int, at: int) -> TextLogprobs | None:
        """at: number of characters of the choice's text that were sent before."""
        if self._body.logprobs is None or self._tokenizer is None:
            return None
        new = [] if self._body.is_prompt_only else new_logprobs(each, num_old)
        entries = [(next(iter(entry)), entry) for entry in new]
        echoed = prompt_entries(output) if self._body.echo and not num_old else []
        return text_logprobs([*echoed, *entries], self._tokenizer, at)

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None or self._tokenizer is None:
            return output.prompt or ""
        return self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
