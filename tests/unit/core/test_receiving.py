"""Prompts that another engine computes: memory for them, how many at a time, ends and shortages meanwhile."""

import pytest

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.prefix_caching.manager import PrefixCachingBlockSpaceManager
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.core.scheduler import Scheduler, make_scheduler
from sarathi.messages import CacheCapacity, RequestUpdate, SampledToken, SchedulerOutput, StepResult
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

ROWS, MOST_RECEIVED = 12, 20


@pytest.fixture
def scheduler() -> Scheduler:
    manager = VirtualBlockSpaceManager(CacheCapacity(ROWS, 1, 4))  # a row has 4 tokens
    return make_scheduler(SchedulerConfig(max_num_seqs=8), manager, 100, 1, MOST_RECEIVED)


def add(scheduler: Scheduler, name: str, length: int, max_tokens: int = 3) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    scheduler.add(Request(name, tuple(range(1, length + 1)), params))


def run(scheduler: Scheduler) -> tuple[SchedulerOutput, list[RequestUpdate]]:
    out = scheduler.schedule()
    tokens = tuple(SampledToken(chunk.request_id, 9) for chunk in out.chunks if chunk.samples)
    return out, scheduler.update(out, StepResult(out.step_id, tokens))


def token_of(name: str) -> RequestUpdate:
    return RequestUpdate(name, (SampledToken(name, 7),), "length")


def received(out: SchedulerOutput) -> list[tuple[str, int, int]]:
    return [(chunk.request_id, chunk.start, chunk.num_tokens) for chunk in out.received]


def test_a_prompt_is_not_computed_and_goes_on_with_its_token(scheduler: Scheduler) -> None:
    add(scheduler, "a", 10)
    out, updates = run(scheduler)
    assert received(out) == [("a", 0, 10)] and [new.request_id for new in out.new_requests] == ["a"]
    assert not out.chunks and not updates and scheduler.block_space_manager.num_used_rows == 3
    out, _ = run(scheduler)
    assert out.is_empty
    assert [update.tokens[0].token_id for update in scheduler.end_receive("a", token_of("a"))] == [7]
    out, updates = run(scheduler)
    assert [(chunk.start, chunk.num_tokens, chunk.samples) for chunk in out.chunks] == [(10, 1, True)]
    assert updates[0].tokens[0].token_id == 9 and updates[0].finish_reason is None
    scheduler.check_integrity()


def test_so_many_are_received_at_a_time_as_are_asked_for(scheduler: Scheduler) -> None:
    for name in "abcd":
        add(scheduler, name, 9)
    assert [name for name, _, _ in received(run(scheduler)[0])] == ["a", "b"]
    assert run(scheduler)[0].is_empty
    scheduler.end_receive("a", token_of("a"))
    assert [name for name, _, _ in received(run(scheduler)[0])] == ["c"]


def test_a_prompt_longer_than_that_is_received_alone(scheduler: Scheduler) -> None:
    add(scheduler, "a", MOST_RECEIVED + 5)
    add(scheduler, "b", 1)
    assert [name for name, _, _ in received(run(scheduler)[0])] == ["a"]


def test_memory_of_an_aborted_request_is_in_use_until_nothing_more_arrives(scheduler: Scheduler) -> None:
    add(scheduler, "a", 10)
    run(scheduler)
    assert scheduler.finish("a", "abort") and not scheduler.is_unfinished("a")
    assert not run(scheduler)[0].finished and scheduler.block_space_manager.num_used_rows == 3
    assert scheduler.end_receive("a", None) == []
    assert run(scheduler)[0].finished == ("a",) and not scheduler.block_space_manager.num_used_rows
    assert not scheduler.has_work


def test_a_request_may_end_with_its_first_token(scheduler: Scheduler) -> None:
    add(scheduler, "a", 4, max_tokens=1)
    run(scheduler)
    [ended] = scheduler.end_receive("a", token_of("a"))
    assert (ended.finish_reason, len(ended.tokens)) == ("length", 1)
    run(scheduler)
    assert not scheduler.has_work and not scheduler.block_space_manager.num_used_rows


@pytest.mark.parametrize("length", [1, 10])
def test_a_prompt_that_the_other_engine_cannot_compute_is_computed_here(scheduler: Scheduler, length: int) -> None:
    add(scheduler, "a", length, max_tokens=1)
    run(scheduler)
    assert scheduler.end_receive("a", RequestUpdate("a", (), "error", "not finite")) == []
    preempted = scheduler.preempt_all()
    assert preempted.preempted == ("a",)
    scheduler.update(preempted, StepResult(preempted.step_id))
    out, [update] = run(scheduler)
    assert not out.received and [tuple(chunk[:4]) for chunk in out.chunks] == [("a", 0, length, True)]
    assert (update.tokens[0].token_id, update.finish_reason) == (9, "length")
    run(scheduler)
    assert not scheduler.has_work and not scheduler.block_space_manager.num_used_rows


@pytest.fixture
def caching() -> Scheduler:
    """A row has 4 tokens, and there are 60."""
    manager = PrefixCachingBlockSpaceManager(CacheCapacity(60, 1, 4, num_retained=4))
    return make_scheduler(SchedulerConfig(max_num_seqs=8), manager, 250, 1, 500)


def started(out: SchedulerOutput) -> list[tuple[str, int, int]]:
    return [(chunk.request_id, chunk.start, chunk.num_tokens) for chunk in out.chunks]


def test_prompts_that_are_alike_are_received_once(caching: Scheduler) -> None:
    for name in "abc":
        add(caching, name, 100, max_tokens=5)
    assert received(run(caching)[0]) == [("a", 0, 100)]
    for _ in range(300):  # however long that takes
        assert run(caching)[0].is_empty
    caching.end_receive("a", token_of("a"))
    run(caching)
    out, _ = run(caching)
    assert not out.received and started(out)[1:] == [("b", 99, 1), ("c", 99, 1)]
    assert caching.block_space_manager.num_used_rows == 26 + 2  # the last row of each is its own
    while caching.has_work:
        run(caching)
    caching.check_integrity()


def test_what_is_cached_of_a_prompt_is_not_received(caching: Scheduler) -> None:
    add(caching, "a", 100)
    run(caching)
    caching.end_receive("a", token_of("a"))
    while caching.has_work:
        run(caching)
    add(caching, "b", 180)
    add(caching, "c", 110)
    out, _ = run(caching)
    assert received(out) == [("b", 100, 80)] and started(out) == [("c", 100, 10)]
    assert caching.end_receive("b", RequestUpdate("b", (), "error")) == []
    assert ("b", 100, 80) in started(run(caching)[0])


def test_what_may_not_have_arrived_is_not_found(caching: Scheduler) -> None:
    add(caching, "a", 100)
    run(caching)
    caching.finish("a", "abort")
    caching.end_receive("a", None)
    add(caching, "b", 100)
    assert received(run(caching)[0]) == [("b", 0, 100)]
    caching.check_integrity()


def test_a_prompt_whose_memory_cannot_be_mapped_is_received_again(scheduler: Scheduler) -> None:
    add(scheduler, "a", 10)
    out = scheduler.schedule()
    scheduler.update(out, StepResult(out.step_id, available_rows=ROWS))
    assert run(scheduler)[0].preempted == ("a",)  # workers forget what they mapped
    assert received(run(scheduler)[0]) == [("a", 0, 10)]
    scheduler.end_receive("a", token_of("a"))
    assert run(scheduler)[1][0].tokens[0].token_id == 9
    scheduler.check_integrity()


def test_a_request_that_ends_while_its_memory_cannot_be_mapped_is_gone(scheduler: Scheduler) -> None:
    add(scheduler, "a", 10)
    out = scheduler.schedule()
    scheduler.finish("a", "abort")
    scheduler.update(out, StepResult(out.step_id, available_rows=ROWS))
    assert run(scheduler)[0].finished == ("a",) and not scheduler.has_work
    assert not scheduler.block_space_manager.num_used_rows


def test_a_preempted_request_is_computed_here(scheduler: Scheduler) -> None:
    for name in "ab":
        add(scheduler, name, 10, max_tokens=30)
    run(scheduler)
    for name in "ab":
        scheduler.end_receive(name, token_of(name))
    while not scheduler.num_preemptions:
        run(scheduler)
    while scheduler.has_work:
        out, _ = run(scheduler)
        assert not out.received
        if any(chunk.request_id == "b" and chunk.num_tokens > 1 for chunk in out.chunks):
            return
    raise AssertionError("the preempted request was not computed again")
