"""One LLM in several threads: shared batches, a close in the middle, and use from inside a step."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import END, echo, make_engine, says

from sarathi.entrypoints.llm import LLM
from sarathi.sampling_params import SamplingParams

LONG = SamplingParams(max_tokens=150, ignore_eos=True)


def slow_echo(tokens: Sequence[int], params: SamplingParams) -> int:
    """Lets other threads run in mid-step, as a kernel that releases the interpreter does."""
    time.sleep(0.0005)
    return echo(tokens, params)


def token_ids(llm: LLM, prompt: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=20, seed=prompt[0])
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids


def test_threads_get_what_each_prompt_gets_alone() -> None:
    prompts = [[index, 7 * index % 256] for index in range(24)]
    alone = LLM.from_engine(make_engine(echo))
    expected = [token_ids(alone, prompt) for prompt in prompts]
    llm = LLM.from_engine(make_engine(slow_echo, max_num_seqs=3))
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda prompt: token_ids(llm, prompt), prompts)) == expected
    assert not llm.engine.has_work and llm.engine.num_unfinished == 0 and llm.memory_stats().mapped_bytes == 0
    llm.engine.core.scheduler.check_integrity()


def test_streams_of_several_threads_lose_nothing() -> None:
    llm = LLM.from_engine(make_engine(says("abcdef" * 5)))

    def read(_: int) -> str:
        return "".join(output.outputs[0].delta for output in llm.stream("x\0", SamplingParams(max_tokens=29)))

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(8))) == {("abcdef" * 5)[:29]}


def test_threads_that_leave_their_streams_early_free_the_memory() -> None:
    llm = LLM.from_engine(make_engine(slow_echo))

    def read(count: int) -> None:
        stream = llm.stream([1, count], LONG)
        for _ in range(count):
            next(stream)
        stream.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(1, 13)))
    assert llm.engine.num_unfinished == 0 and llm.memory_stats().mapped_bytes == 0


def test_a_prompt_that_is_refused_harms_no_other_thread() -> None:
    llm = LLM.from_engine(make_engine(slow_echo))

    def ask(index: int) -> str:
        try:
            return str(len(token_ids(llm, [1] * (300 if index % 2 else 3))))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(12)))
    assert answers[::2] == ["20"] * 6 and all("longest sequence is 200" in answer for answer in answers[1::2])


def test_close_waits_for_the_step_of_another_thread_whose_requests_then_end() -> None:
    is_in_step, may_go_on, log = threading.Event(), threading.Event(), []

    def next_token(tokens: Sequence[int], params: SamplingParams) -> int:
        is_in_step.set()
        may_go_on.wait(60)
        log.append("step")
        return 65

    llm = LLM.from_engine(make_engine(next_token))
    executor = llm.engine.core.executor

    def generate() -> str:
        try:
            llm.generate([1], LONG, use_tqdm=False)
        except RuntimeError as error:
            return str(error)
        return "completed"

    def close() -> None:
        llm.close()
        log.append("closed")

    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(generate)
        assert is_in_step.wait(60)
        closing = pool.submit(close)
        time.sleep(0.05)
        assert not executor.is_shut_down and not closing.done()
        may_go_on.set()
        closing.result(60)
        assert "the LLM was closed" in answer.result(60)
    assert executor.is_shut_down and log[-1] == "closed"
    with pytest.raises(RuntimeError, match="takes no more requests"):
        llm.generate([1], LONG, use_tqdm=False)


@pytest.mark.parametrize("what", ["generate", "close", "memory_stats", "stream"])
def test_use_from_inside_a_step_is_refused_and_harms_nothing(what: str) -> None:
    uses = {
        "generate": lambda: llm.generate([5], use_tqdm=False),
        "close": lambda: llm.close(),
        "memory_stats": lambda: llm.memory_stats(),
        "stream": lambda: next(llm.stream([5])),
    }
    errors = []

    def next_token(tokens: Sequence[int], params: SamplingParams) -> int:
        if tokens[0] == 1 and not errors:
            with pytest.raises(RuntimeError, match="already executing a step in this thread") as caught:
                uses[what]()
            errors.append(str(caught.value))
        return END if len(tokens) > 5 else 65

    llm = LLM.from_engine(make_engine(next_token))
    [output] = llm.generate([1], SamplingParams(max_tokens=20), use_tqdm=False)
    assert output.outputs[0].text == "AAAAA" and len(errors) == 1
    assert llm.generate([2, 3], use_tqdm=False)[0].outputs[0].text == "AAAA"
