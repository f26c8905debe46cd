"""The engine for asyncio: one asynchronous generator per request; the core runs in its own process.

llm = await AsyncLLM.start(make_config(model="smollm2-135m"))
async for output in llm.generate("The capital of France is", SamplingParams(temperature=0)):
    print(output.outputs[0].delta, end="")
await llm.shutdown()
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from sarathi.config.schema import EngineConfig
from sarathi.containers import is_list
from sarathi.engine.admission import UNLIMITED, Admission, QueueLimits, check_characters, check_tokens, num_characters
from sarathi.engine.build import build_core, build_tokenizer
from sarathi.engine.core_process.client import CoreProcess
from sarathi.engine.core_process.link import CoreDiedError, CoreLink
from sarathi.engine.core_process.wire import ResetPrefixCache, SetCacheBudget, Sleep, WakeUp
from sarathi.engine.input_processor import InputProcessor, Prompt, encode_chat
from sarathi.engine.mailbox import Mailbox
from sarathi.engine.output_processor import OutputProcessor, RequestState
from sarathi.engine.outputs import RequestOutput
from sarathi.engine.tokenizer.chat_template import Conversation
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.messages import CoreOutput, CoreStats, EngineFacts
from sarathi.sampling_params import SamplingParams

T = TypeVar("T")
Outputs = AsyncGenerator[RequestOutput, None]
_TOKENIZER_THREADS = 2
_IDLE_POLL_S = 0.02
_DELIVERY_TIMEOUT_S = 1.0  # for callers to receive the error that ends their request


class EngineUnavailableError(RuntimeError):
    """The engine accepts no more requests, or has ended this one."""


class StepFailedError(RuntimeError):
    """A step failed, which ended all requests in the engine. It accepts new ones."""


class AsyncLLM:
    """An engine that belongs to one event loop. It tokenizes prompts in threads.

    observe: called with every output of every request, including the final output of an aborted request.
    """

    def __init__(
        self, core: CoreLink, tokenizer: Tokenizer | None, end_token_ids: frozenset[int],
        limits: QueueLimits = UNLIMITED, observe: Callable[[RequestOutput], None] = lambda output: None,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self._core = core
        self._observe = observe
        self._inputs = InputProcessor(tokenizer, core.facts.vocab_size, end_token_ids)
        self._outputs = OutputProcessor(tokenizer, time.monotonic)
        self._admission = Admission(limits)
        self._mailboxes: dict[str, Mailbox] = {}
        self._ids = map(str, itertools.count())
        self._core_ids = itertools.count()
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._refusal: str | None = None
        self._died = asyncio.Event()
        core.listen(self)

    @classmethod
    async def start(
        cls, config: EngineConfig, *, heartbeat_timeout_s: float = 10.0, limits: QueueLimits = UNLIMITED,
        observe: Callable[[RequestOutput], None] = lambda output: None,
    ) -> "AsyncLLM":  # fmt: skip
        """Load the model in a new process. Raises ValueErrors that name the setting at fault.

        heartbeat_timeout_s: time without heartbeats after which the engine counts as dead.
        """
        starting = asyncio.create_task(CoreProcess.start(partial(build_core, config), heartbeat_timeout_s))
        try:
            tokenizer, end_token_ids = await asyncio.to_thread(build_tokenizer, config)  # imports take seconds
        except BaseException:
            await _abandon(starting)
            raise
        core = await starting
        try:
            return cls(core, tokenizer, end_token_ids, limits, observe)
        except BaseException:
            await core.close()
            raise

    @classmethod
    async def join(
        cls, config: EngineConfig, connect: Callable[[], Awaitable[CoreLink]], *, limits: QueueLimits = UNLIMITED,
        observe: Callable[[RequestOutput], None] = lambda output: None,
    ) -> "AsyncLLM":  # fmt: skip
        """Share a core that another process has started with this configuration. connect: returns a link to it."""
        tokenizer, end_token_ids = await asyncio.to_thread(build_tokenizer, config)
        return cls(await connect(), tokenizer, end_token_ids, limits, observe)

    @property
    def facts(self) -> EngineFacts:
        """Reported by the core after its start."""
        return self._core.facts

    @property
    def error(self) -> CoreDiedError | None:
        """Why the core died; None while it is alive."""
        return self._core.error

    @property
    def num_unfinished(self) -> int:
        """Unfinished requests, including those that are being tokenized."""
        return len(self._mailboxes)

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None, *,
        priority: int = 0, timeout_s: float | None = None,
    ) -> Outputs:  # fmt: skip
        """Complete one prompt. Yields an output for new tokens and at the end; merges outputs for a slow caller.
        Closing the generator, or cancelling its task, aborts the request.

        request_id: unique among unfinished requests; None: a number.
        priority: lower values run first, whatever their arrival times. timeout_s: until the end; None: no timeout.

        Raises ValueError for a wrong prompt or parameter (RequestTooLongError for a prompt that is too long),
        OverloadedError, EngineUnavailableError, RequestTimeoutError, StepFailedError, CoreDiedError.
        """
        submitted = self.submit(prompt, sampling_params, request_id, priority=priority, timeout_s=timeout_s)
        async with aclosing(await submitted) as outputs:
            async for output in outputs:
                yield output

    async def submit(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None, *,
        priority: int = 0, timeout_s: float | None = None,
    ) -> Outputs:  # fmt: skip
        """Like `generate`, but returns once the request is queued, and raises errors in the request itself."""
        request_id = next(self._ids) if request_id is None else request_id
        outputs = self._run(request_id, prompt, sampling_params or SamplingParams(), priority, timeout_s)
        await anext(outputs)
        return outputs  # type: ignore[return-value]  # only the first is None

    async def in_thread(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run a slow function, e.g. tokenizing, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments, **named))

    async def encode_chat(self, conversation: Conversation, **options: Any) -> list[int]:
        """Token ids of a conversation; for the options see `input_processor.encode_chat`."""
        check_characters(num_characters(conversation), self.facts)
        return await self.in_thread(encode_chat, self.tokenizer, conversation, **options)

    async def stats(self) -> CoreStats:
        """Queue lengths and memory of the core between two steps. Raises CoreDiedError."""
        return await self._core.stats()

    async def set_cache_budget(self, memory_bytes: int) -> None:
        """Shrink or grow the KV cache of the running engine. ValueError: see `CacheBudget.set_bytes`."""
        await self._core.change_memory(SetCacheBudget(memory_bytes))

    async def sleep(self, level: int = 1) -> None:
        """Return the KV cache's memory to the system. All requests, including new ones, wait until `wake_up`.

        level: 1, or 2 to release the weights too. ValueError: see `CoreClient.sleep`.
        """
        await self._core.change_memory(Sleep(level))

    async def wake_up(self) -> None:
        """Allocate the memory again and resume. ValueError: see `CoreClient.wake_up`."""
        await self._core.change_memory(WakeUp())

    async def reset_prefix_cache(self) -> bool:
        """Drop the cached prefixes of finished requests; False, without effect, while a request is unfinished."""
        try:
            await self._core.change_memory(ResetPrefixCache())
        except ValueError:
            return False
        return True

    def kill(self) -> None:
        """Kill the core process, which ends every request."""
        self._core.kill()

    async def wait_until_idle(self) -> None:
        """Return once no request is unfinished."""
        while self._mailboxes:
            await asyncio.sleep(_IDLE_POLL_S)

    async def wait_until_dead(self) -> None:
        """Return once the core has died."""
        await self._died.wait()

    def refuse_requests(self, reason: str) -> None:
        """Reject new requests from now on; unfinished ones continue."""
        self._refusal = reason

    async def shutdown(self) -> None:
        """End every request with EngineUnavailableError, then end the core process. Idempotent."""
        self.refuse_requests("the engine is shut down")
        self._fail_all(EngineUnavailableError("the engine was shut down before the request had ended"))
        deadline_s = time.monotonic() + _DELIVERY_TIMEOUT_S
        while any(each.is_awaited for each in self._mailboxes.values()) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)  # lets their generators run
        await self._core.close()
        self._threads.shutdown(wait=False)

    async def _run(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int, timeout_s: float | None
    ) -> AsyncGenerator[RequestOutput | None, None]:
        """Yields None once the request is queued, then its outputs. Its `finally` ends unfinished requests for their
        callers, whatever the reason."""
        mailbox = self._enter(request_id, params.n)
        try:
            with mailbox.deadline(timeout_s):
                await self._add(request_id, prompt, params, priority)
                yield None
                while True:
                    output = await mailbox.take()
                    yield output
                    if output.finished:
                        return
        finally:
            self._leave(request_id)

    def _enter(self, request_id: str, n: int) -> Mailbox:
        if self._core.error is not None:
            raise self._core.error
        if self._refusal is not None:
            raise EngineUnavailableError(self._refusal)
        if request_id in self._mailboxes:
            raise ValueError(f"request id {request_id!r} belongs to a request that has not ended")
        self._admission.enter(request_id, n)
        return self._mailboxes.setdefault(request_id, Mailbox())

    async def _add(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int) -> None:
        """Uses a unique id in the core, which may still compute an aborted request with the caller's id."""
        arrived_at_s = time.monotonic()
        if isinstance(prompt, str):
            check_characters(len(prompt), self.facts)
        elif is_list(prompt):
            check_tokens(len(prompt), self.facts)
        core_id = f"{request_id}.{self._core.name}{next(self._core_ids)}"
        requests = await self.in_thread(self._inputs.process, core_id, prompt, params, priority)
        check_tokens(len(requests[0].token_ids), self.facts)
        self._admission.set_length(request_id, len(requests[0].token_ids))
        if self._core.error is not None:
            raise self._core.error
        self._outputs.add(request_id, prompt if isinstance(prompt, str) else None, requests, arrived_at_s)
        self._core.add_requests(requests)

    def _leave(self, request_id: str) -> None:
        del self._mailboxes[request_id]
        self._admission.leave(request_id)
        state = self._outputs.states.get(request_id)
        if state is not None:
            self._core.finish([each.request_id for each in state.completions], "abort")
            self._end(state, "abort")

    def _end(self, state: RequestState, reason: str) -> None:
        self._observe(self._outputs.end(state, reason))

    def _fail(self, completion_ids: Sequence[str], error: Exception) -> None:
        for state in filter(None, map(self._outputs.find, completion_ids)):
            self._mailboxes[state.request_id].fail(error)

    def _fail_all(self, error: Exception) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)

    # CoreListener: reports of the core, on the event loop.

    def on_outputs(self, output: CoreOutput) -> None:
        for state in filter(None, map(self._outputs.find, output.first_scheduled)):
            self._admission.start(state.request_id)
        outputs, stops = self._outputs.process(output)
        for request_id, stop in stops:
            self._core.finish([request_id], "stop", stop)
        for each in outputs:
            self._observe(each)
            self._mailboxes[each.request_id].put(each)

    def on_refused(self, request_ids: Sequence[str], message: str) -> None:
        self._fail(request_ids, ValueError(message))

    def on_step_failed(self, request_ids: Sequence[str], message: str) -> None:
        self._fail(request_ids, StepFailedError(f"a step failed, and the request with it: {message}"))

    def on_death(self, error: CoreDiedError) -> None:
        self._fail_all(error)
        self._died.set()


async def _abandon(starting: "asyncio.Task[CoreProcess]") -> None:
    """End a core process that is starting or has just started."""
    starting.cancel()
    with suppress(Exception, asyncio.CancelledError):
        await (await starting).close()
