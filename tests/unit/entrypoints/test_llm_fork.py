"""A process forked from one with an LLM: every call is refused with one error, none hangs, the parent goes on."""

import os
import threading
from collections.abc import Callable

import pytest
from fake_engine import echo, make_engine

from sarathi.entrypoints.llm import LLM
from sarathi.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=8)


def in_child(act: Callable[[], object]) -> str:
    """What `act` returned or raised in a forked process, which must end within 60 s."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            said = repr(act())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    killer = threading.Timer(60, os.kill, (child, 9))
    killer.start()
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    killer.cancel()
    return said


@pytest.mark.parametrize("is_in_step", [False, True])
def test_a_forked_process_is_refused_and_closes_without_effect(is_in_step: bool) -> None:
    llm = LLM.from_engine(make_engine(echo))
    expected = llm.generate([5], PARAMS, use_tqdm=False)[0].outputs[0].token_ids
    stream = llm.stream([5], PARAMS)
    next(stream)
    if is_in_step:
        llm._lock.acquire()  # as a thread in mid-step holds it, which the child does not have
    calls: list[Callable[[], object]] = [
        lambda: llm.generate([5], PARAMS, use_tqdm=False),
        lambda: next(stream),
        llm.memory_stats,
    ]
    for call in calls:
        said = in_child(call)
        assert said.startswith(f"RuntimeError: this LLM belongs to process {os.getpid()}"), said
    assert in_child(llm.close) == "None"
    assert in_child(stream.close) == "None"
    if is_in_step:
        llm._lock.release()
    assert sum(1 for _ in stream) == len(expected) - 1
    assert llm.generate([5], PARAMS, use_tqdm=False)[0].outputs[0].token_ids == expected
    llm.engine.core.scheduler.check_integrity()
