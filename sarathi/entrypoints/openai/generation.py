"""Submit the prompts of one HTTP request, merge their outputs, and find what is new in each."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

from sarathi.engine.async_llm import Outputs
from sarathi.engine.input_processor import Prompt
from sarathi.engine.outputs import CompletionOutput, RequestOutput
from sarathi.entrypoints.openai.objects import PromptTokensDetails, Usage
from sarathi.entrypoints.server.context import ServerContext
from sarathi.entrypoints.server.errors import check_not_failed
from sarathi.sampling_params import SamplingParams

NumberedOutputs = AsyncGenerator[tuple[int, RequestOutput], None]


class Header:
    """Fields that all chunks of a response share."""

    def __init__(self, prefix: str, model: str, separator: str = "-") -> None:
        self.id = f"{prefix}{separator}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model


async def submit(
    context: ServerContext, header: Header, prompts: Sequence[Prompt], params: SamplingParams, priority: int | None
) -> list[Outputs]:
    """Queue all prompts, or none if one of them is refused."""
    submitted: list[Outputs] = []
    try:
        for number, prompt in enumerate(prompts):
            outputs = await context.llm.submit(
                prompt, params, f"{header.id}-{number}", priority=priority or 0, timeout_s=context.request_timeout_s
            )
            submitted.append(outputs)
    except BaseException:
        await _close(submitted)
        raise
    return submitted


async def numbered(submitted: Sequence[Outputs]) -> NumberedOutputs:
    """Outputs of all prompts as they arrive, with the index of the prompt. Raises RequestFailedError if one failed.
    Closing it aborts the unfinished ones."""
    try:
        merged = _of_one(submitted[0]) if len(submitted) == 1 else _of_many(submitted)
        async with aclosing(merged):
            async for number, output in merged:
                check_not_failed(output)
                yield number, output
    finally:
        await _close(submitted)


async def last_outputs(submitted: Sequence[Outputs]) -> list[RequestOutput]:
    """The finished output of each prompt."""
    async with aclosing(numbered(submitted)) as outputs:
        finished = {number: output async for number, output in outputs}
    return [finished[number] for number in range(len(submitted))]


class Changes:
    """Tracks which of a prompt's completions have new tokens."""

    def __init__(self, n: int) -> None:
        self._num_tokens = [0] * n
        self._is_finished = [False] * n

    def of(self, output: RequestOutput) -> Iterator[tuple[CompletionOutput, int]]:
        """Completions with new tokens, and how many of their tokens were seen before."""
        for each in output.outputs:
            num_old = self._num_tokens[each.index]
            if each.num_tokens > num_old or each.finished > self._is_finished[each.index]:
                self._num_tokens[each.index], self._is_finished[each.index] = each.num_tokens, each.finished
                yield each, num_old


class UsageCount:
    """Token counts of a request over all of its prompts."""

    def __init__(self) -> None:
        self._of_prompts: dict[int, tuple[int, int, int]] = {}

    def take(self, number: int, output: RequestOutput) -> None:
        """Count the latest output of a prompt."""
        num_tokens = sum([each.num_tokens for each in output.outputs])
        self._of_prompts[number] = len(output.prompt_token_ids), num_tokens, output.num_cached_tokens

    def usage(self) -> Usage:
        prompt, completion, cached = map(sum, zip(*self._of_prompts.values(), strict=True))
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))


async def _of_one(outputs: Outputs) -> NumberedOutputs:
    async for output in outputs:
        yield 0, output


async def _of_many(submitted: Sequence[Outputs]) -> NumberedOutputs:
    """One pending `anext` per prompt, renewed when its output is consumed."""
    pending = {asyncio.ensure_future(anext(outputs)): number for number, outputs in enumerate(submitted)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = pending.pop(task)
                output = task.result()
                if not output.finished:
                    pending[asyncio.ensure_future(anext(submitted[number]))] = number
                yield number, output
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _close(submitted: Sequence[Outputs]) -> None:
    for outputs in submitted:
        await outputs.aclose()
