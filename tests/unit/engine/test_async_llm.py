"""AsyncLLM over a core process with a model of a few lines: outputs, cancelling, refusals, failures."""

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from fake_engine import FakeExecutor, byte_tokenizer, echo, make_engine, says
from process_tree import children

from sarathi.config.load import make_config
from sarathi.core.scheduler import RequestTooLongError
from sarathi.engine import async_llm
from sarathi.engine.admission import UNLIMITED, OverloadedError, QueueLimits
from sarathi.engine.async_llm import AsyncLLM, EngineUnavailableError, StepFailedError
from sarathi.engine.core import EngineCore
from sarathi.engine.core_process.client import CoreProcess
from sarathi.engine.core_process.link import CoreDiedError
from sarathi.engine.input_processor import Prompt
from sarathi.engine.outputs import RequestOutput
from sarathi.sampling_params import SamplingParams

LONG = SamplingParams(max_tokens=190)
ANSWER = "Grüße, 世界! STOP and more"


def make_core() -> EngineCore:
    return make_engine(says(ANSWER)).core


def make_echoing_core() -> EngineCore:
    return make_engine(echo, max_num_seqs=8).core


class SlowExecutor(FakeExecutor):
    """20 ms a step; a prompt that begins with 255 breaks it."""

    step_s = 0.02

    def launch(self, out):
        if any(new.token_ids[0] == 255 for new in out.new_requests):
            raise RuntimeError("broken by a prompt")
        time.sleep(self.step_s)
        return super().launch(out)


def make_slow_core() -> EngineCore:
    core = make_engine(echo, max_num_seqs=2).core
    core.executor = SlowExecutor(echo)
    return core


def make_very_slow_core() -> EngineCore:
    core = make_slow_core()
    core.executor.step_s = 0.1
    return core


class AheadExecutor(FakeExecutor):
    """As on a GPU: a step is launched before the result of the last one is taken, and takes 20 ms."""

    max_in_flight = 2

    def launch(self, out):
        time.sleep(0.02)
        return super().launch(out)


def make_core_with_steps_ahead() -> EngineCore:
    core = make_engine(echo, max_num_seqs=8).core
    core.executor = AheadExecutor(echo)
    return core


def with_llm(
    use: Callable[[AsyncLLM], Awaitable[None]],
    make: Callable[[], EngineCore] = make_core,
    limits: QueueLimits = UNLIMITED,
    observe: Callable[[RequestOutput], None] = lambda output: None,
) -> None:
    async def run() -> None:
        tokenizer = byte_tokenizer()
        core = await CoreProcess.start(make)
        llm = AsyncLLM(core, tokenizer, tokenizer.eos_token_ids, limits, observe)
        try:
            await use(llm)
        finally:
            await llm.shutdown()

    asyncio.run(asyncio.wait_for(run(), 60))


async def last(llm: AsyncLLM, prompt: Prompt, params: SamplingParams) -> RequestOutput:
    return [output async for output in llm.generate(prompt, params)][-1]


async def until_empty(llm: AsyncLLM) -> None:
    while (stats := await llm.stats()).num_running or stats.num_waiting or stats.memory.mapped_bytes:
        await asyncio.sleep(0.01)


def test_text_streams_whole_characters_and_ends_before_the_stop_string() -> None:
    async def use(llm: AsyncLLM) -> None:
        outputs = [each async for each in llm.generate("\0", SamplingParams(max_tokens=60, stop="STOP"))]
        assert "".join(each.outputs[0].delta for each in outputs) == "Grüße, 世界! "
        assert (outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].stop_reason) == ("stop", "STOP")
        assert not any("\ufffd" in each.outputs[0].text for each in outputs)
        times = outputs[-1].metrics
        assert times.arrival_time_s <= times.first_scheduled_time_s <= times.first_token_time_s <= times.finish_time_s
        await until_empty(llm)

    with_llm(use)


def test_many_at_once_give_what_the_engine_in_process_gives() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    params = [
        SamplingParams(n=rng.randint(1, 3), max_tokens=rng.randint(1, 40), seed=rng.randrange(9), logprobs=1)
        for _ in range(40)
    ]
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in params]
    engine = make_engine(echo, max_num_seqs=8)
    for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(number), prompt, each)
    expected = {}
    while engine.has_work:
        expected.update({int(output.request_id): output for output in engine.step() if output.finished})

    async def use(llm: AsyncLLM) -> None:
        got = await asyncio.gather(*(last(llm, *pair) for pair in zip(prompts, params, strict=True)))
        for number, output in enumerate(got):
            for mine, other in zip(output.outputs, expected[number].outputs, strict=True):
                assert (mine.token_ids, mine.text, mine.logprobs) == (other.token_ids, other.text, other.logprobs)
                assert mine.finish_reason == other.finish_reason

    with_llm(use, make_echoing_core)


@pytest.mark.parametrize("how", ["close", "cancel", "break"])
def test_a_generator_that_ends_early_aborts_its_request(how: str) -> None:
    observed = []

    async def read(llm: AsyncLLM, num_outputs: int) -> None:
        async with aclosing(llm.generate([1, 2], LONG)) as outputs:
            async for _ in outputs:
                num_outputs -= 1
                if not num_outputs:
                    return

    async def use(llm: AsyncLLM) -> None:
        if how == "close":
            outputs = await llm.submit([1, 2], LONG)
            await outputs.aclose()
        elif how == "cancel":
            task = asyncio.create_task(read(llm, 1000))
            while not observed:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
        else:
            await read(llm, 2)
        assert llm.num_unfinished == 0
        assert observed[-1].finished and observed[-1].outputs[0].finish_reason == "abort"
        await asyncio.wait_for(until_empty(llm), 15)  # all its tokens take 19 s

    with_llm(use, make_very_slow_core, observe=observed.append)


def test_a_slow_reader_gets_all_the_text_in_few_outputs() -> None:
    async def use(llm: AsyncLLM) -> None:
        outputs = await llm.submit("\0", SamplingParams(max_tokens=60))
        await until_empty(llm)
        got = [each async for each in outputs]
        assert len(got) == 1 and got[0].outputs[0].delta == ANSWER

    with_llm(use)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "the prompt is empty"),
        ([300], ValueError, "token id 300"),
        ("x" * 200, RequestTooLongError, "has 200 tokens: the longest that can run has 199"),
        ("\ud800", ValueError, "lone surrogate"),
    ],
)
def test_what_is_wrong_is_told_by_submit_and_leaves_nothing(prompt: Prompt, error, message: str) -> None:
    async def use(llm: AsyncLLM) -> None:
        with pytest.raises(error, match=message):
            await llm.submit(prompt, LONG)
        assert llm.num_unfinished == 0

    with_llm(use)


def test_a_full_queue_refuses_and_serves_what_it_took() -> None:
    async def use(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        results = await asyncio.gather(*(last(llm, [1], params) for _ in range(30)), return_exceptions=True)
        refused = [each for each in results if isinstance(each, OverloadedError)]
        served = [each for each in results if isinstance(each, RequestOutput)]
        assert len(served) + len(refused) == 30 and len(refused) >= 20
        assert all(each.finished and each.outputs[0].num_tokens == 5 for each in served)
        assert all(1 <= each.retry_after_s <= 60 for each in refused)

    with_llm(use, make_slow_core, QueueLimits(max_requests=4))


def test_a_failed_step_fails_its_requests_and_the_next_one_is_served() -> None:
    async def use(llm: AsyncLLM) -> None:
        bystander = await llm.submit([1], LONG)
        await anext(bystander)
        with pytest.raises(StepFailedError, match="broken by a prompt"):
            await last(llm, [255], LONG)
        with pytest.raises(StepFailedError):
            async for _ in bystander:
                pass
        assert (await last(llm, [1], SamplingParams(max_tokens=2))).finished

    with_llm(use, make_slow_core)


def test_a_failed_step_spares_requests_that_the_core_did_not_have() -> None:
    async def use(llm: AsyncLLM) -> None:
        encoding = threading.Event()
        process = llm._inputs.process

        def slow(*arguments):
            encoding.wait(60)
            return process(*arguments)

        llm._inputs.process = slow
        spared = asyncio.create_task(last(llm, [1], SamplingParams(max_tokens=2)))
        await asyncio.sleep(0.05)
        llm._inputs.process = process
        with pytest.raises(StepFailedError):
            await last(llm, [255], LONG)
        encoding.set()
        assert (await spared).finished

    with_llm(use, make_slow_core)


def test_an_id_may_be_used_again_while_the_core_still_computes_the_aborted_request() -> None:
    async def use(llm: AsyncLLM) -> None:
        for _ in range(5):
            outputs = await llm.submit([1, 2], LONG, "mine")
            await anext(outputs)
            await outputs.aclose()
        [*_, output] = [each async for each in llm.generate([1, 2], SamplingParams(n=2, max_tokens=3), "mine")]
        assert output.request_id == "mine" and [each.num_tokens for each in output.outputs] == [3, 3]
        assert [each async for each in llm.generate([1], SamplingParams(max_tokens=1), "mine#1")][-1].finished

    with_llm(use, make_core_with_steps_ahead)


def test_an_id_in_use_is_refused_and_the_first_request_goes_on() -> None:
    async def use(llm: AsyncLLM) -> None:
        outputs = await llm.submit([1], SamplingParams(max_tokens=5), "mine")
        with pytest.raises(ValueError, match="'mine' belongs to a request that has not ended"):
            await llm.submit([1], LONG, "mine")
        assert [each async for each in outputs][-1].outputs[0].num_tokens == 5

    with_llm(use, make_slow_core)


def test_completions_count_as_requests_that_wait() -> None:
    async def use(llm: AsyncLLM) -> None:
        many = SamplingParams(n=4, max_tokens=20)
        first = await llm.submit([1], many)
        await anext(first)  # it has begun
        second = await llm.submit([2], many)
        with pytest.raises(OverloadedError, match="4 requests are waiting: the limit is 4"):
            await last(llm, [3], many)
        for outputs in (first, second):
            assert [each async for each in outputs][-1].finished

    with_llm(use, make_slow_core, QueueLimits(max_requests=4))


def test_shutdown_does_not_wait_for_a_caller_who_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "_DELIVERY_TIMEOUT_S", 30.0)

    async def use(llm: AsyncLLM) -> None:
        outputs = await llm.submit([1], LONG)
        await anext(outputs)
        start_s = time.monotonic()
        await llm.shutdown()
        assert time.monotonic() - start_s < 15
        with pytest.raises(EngineUnavailableError):
            async for _ in outputs:
                pass
        assert llm.num_unfinished == 0

    with_llm(use, make_slow_core)


def test_death_of_the_core_ends_open_requests_and_refuses_new_ones() -> None:
    async def use(llm: AsyncLLM) -> None:
        task = asyncio.create_task(last(llm, [1], LONG))
        await asyncio.sleep(0.1)
        os.kill(llm._core._process.pid, signal.SIGKILL)
        with pytest.raises(CoreDiedError):
            await task
        await llm.wait_until_dead()
        assert llm.error is not None and llm.num_unfinished == 0
        with pytest.raises(CoreDiedError):
            await llm.submit([1], LONG)

    with_llm(use, make_slow_core)


def test_requests_go_on_while_new_ones_are_refused_and_end_at_shutdown() -> None:
    async def use(llm: AsyncLLM) -> None:
        task = asyncio.create_task(last(llm, [1], LONG))
        short = asyncio.create_task(last(llm, [1], SamplingParams(max_tokens=5)))
        await asyncio.sleep(0.05)
        llm.refuse_requests("the server is draining")
        with pytest.raises(EngineUnavailableError, match="draining"):
            await llm.submit([1], LONG)
        assert (await short).finished
        await llm.shutdown()
        with pytest.raises(EngineUnavailableError, match="shut down before"):
            await task

    with_llm(use, make_slow_core)


def core_of(config: object) -> EngineCore:
    return make_core()


def test_a_tokenizer_that_fails_ends_the_core_process_that_starts_beside_it(monkeypatch, sockets: Path) -> None:
    started: set[int] = set()

    def fail(config: object) -> None:
        while not (new := set(children(os.getpid())) - before):
            time.sleep(0.01)
        started.update(new)
        raise ValueError("no such tokenizer")

    before = set(children(os.getpid()))
    monkeypatch.setattr("sarathi.engine.async_llm.build_core", core_of)
    monkeypatch.setattr("sarathi.engine.async_llm.build_tokenizer", fail)
    with pytest.raises(ValueError, match="no such tokenizer"):
        asyncio.run(AsyncLLM.start(make_config()))
    assert started and not started & set(children(os.getpid())) and not list(sockets.iterdir())
