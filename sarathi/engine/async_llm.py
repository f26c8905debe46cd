"""The engine for asyncio: one asynchronous generator a request, over a core in a process of its own.

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
_DELIVERY_TIMEOUT_S = 1.0  # for callers to take the error that ends their request


class EngineUnavailableError(RuntimeError):
    """The engine takes no requests any more, or has ended this one."""


class StepFailedError(RuntimeError):
    """A step failed with all requests that were in the engine; it takes new ones."""


class AsyncLLM:
    """An engine that belongs to one event loop. Prompts are tokenized in threads.

    observe: called with every output of every request, the last one of an aborted request included.
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

        heartbeat_timeout_s: silence of that process after which the engine counts as dead.
        """
        starting = asyncio.create_task(CoreProcess.start(partial(build_core, config), heartbeat_timeout_s))
        try:
            tokenizer, end_token_ids = await asyncio.to_thread(build_tokenizer, config)  # takes seconds, of imports
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
        """Share a core that another process has started with this configuration. connect: makes the link to it."""
        tokenizer, end_token_ids = await asyncio.to_thread(build_tokenizer, config)
        return cls(await connect(), tokenizer, end_token_ids, limits, observe)

    @property
    def facts(self) -> EngineFacts:
        """What the core told when it had started."""
        return self._core.facts

    @property
    def error(self) -> CoreDiedError | None:
        """What the core died of; None while it lives."""
        return self._core.error

    @property
    def num_unfinished(self) -> int:
        """Requests under way, those that are being tokenized included."""
        return len(self._mailboxes)

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None, *,
        priority: int = 0, timeout_s: float | None = None,
    ) -> Outputs:  # fmt: skip
        """Complete one prompt, with an output whenever it got a token or ended; outputs that are not taken in time are
        merged. Closing the generator, or cancelling its task, aborts the request.

        request_id: unique among requests under way; None: a number.
        priority: the lower goes first, whenever it arrived. timeout_s: from now to the end; None: any time.

        Raises ValueError where a prompt or parameter is wrong (RequestTooLongError where it is too long),
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
        """As `generate`, but what is wrong with the request is raised here: it is queued when this returns."""
        request_id = next(self._ids) if request_id is None else request_id
        outputs = self._run(request_id, prompt, sampling_params or SamplingParams(), priority, timeout_s)
        await anext(outputs)
        return outputs  # type: ignore[return-value]  # only the first is None

    async def in_thread(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run what takes long, as tokenizing does, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments, **named))

    async def encode_chat(self, conversation: Conversation, **options: Any) -> list[int]:
        """Token ids of a conversation; for the options see `encode_chat` of the input processor."""
        check_characters(num_characters(conversation), self.facts)
        return await self.in_thread(encode_chat, self.tokenizer, conversation, **options)

    async def stats(self) -> CoreStats:
        """Queues and memory of the core between two steps. Raises CoreDiedError."""
        return await self._core.stats()

    async def set_cache_budget(self, memory_bytes: int) -> None:
        """Shrink or grow the KV cache of the running engine. ValueError: see `CacheBudget.set_bytes`."""
        await self._core.change_memory(SetCacheBudget(memory_bytes))

    async def sleep(self, level: int = 1) -> None:
        """Give the memory of the KV cache back to the system. Requests wait until `wake_up`, new ones too.

        level: 2: the memory of the weights too. ValueError: see `CoreClient.sleep`.
        """
        await self._core.change_memory(Sleep(level))

    async def wake_up(self) -> None:
        """Take the memory again, and go on. ValueError: see `CoreClient.wake_up`."""
        await self._core.change_memory(WakeUp())

    async def reset_prefix_cache(self) -> bool:
        """Forget the tokens of ended requests; False, with nothing done, while a request has not ended."""
        try:
            await self._core.change_memory(ResetPrefixCache())
        except ValueError:
            return False
        return True

    def kill(self) -> None:
        """End the core process at once, and with it every request."""
        self._core.kill()

    async def wait_until_idle(self) -> None:
        """Return when no request is under way."""
        while self._mailboxes:
            await asyncio.sleep(_IDLE_POLL_S)

    async def wait_until_dead(self) -> None:
        """Return when the core has died."""
        await self._died.wait()

    def refuse_requests(self, reason: str) -> None:
        """Take no new requests from now on; those under way go on."""
        self._refusal = reason

    async def shutdown(self) -> None:
        """End every request with EngineUnavailableError, and the core process. May be called again."""
        self.refuse_requests("the engine is shut down")
        self._fail_all(EngineUnavailableError("the engine was shut down before the request had ended"))
        deadline_s = time.monotonic() + _DELIVERY_TIMEOUT_S
        while any(each.is_awaited for each in self._mailboxes.values()) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)  # their generators run
        await self._core.close()
        self._threads.shutdown(wait=False)

    async def _run(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int, timeout_s: float | None
    ) -> AsyncGenerator[RequestOutput | None, None]:
        """None once the request is queued, then its outputs. The one place where a request that has not ended is ended
        for its caller, whatever is the reason."""
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
        """The core gets an id that no other request ever has: it may still compute one that its caller has left."""
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

    # What the core tells, on the event loop.

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
    """End a core process, also one that is not or just now started."""
    starting.cancel()
    with suppress(Exception, asyncio.CancelledError):
        await (await starting).close()
