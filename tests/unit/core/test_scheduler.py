"""What every policy keeps to: refusals, endings, steps that overlap, progress and its cost."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from scheduler_simulation import EOS, FakeWorker, expected_output, make_pair, make_request, run_to_end, step

from sarathi.config.schema import SCHEDULERS, SchedulerConfig
from sarathi.core.scheduler import RequestTooLongError, Scheduler
from sarathi.messages import CacheCapacity, RequestUpdate, StepResult
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

BACKENDS = ("sdpa_paged_4", "sdpa_vattn")
WIDE = CacheCapacity(1000, 1, 4)


def pair(capacity=WIDE, max_len=100, backend="sdpa_vattn", **knobs):
    return make_pair(SchedulerConfig(**knobs), backend, capacity, max_len)


# Arrival.


@pytest.mark.parametrize("policy", SCHEDULERS)
def test_a_request_that_can_never_run_is_refused_with_the_numbers(policy: str) -> None:
    scheduler, _ = pair(type=policy, max_len=50)
    with pytest.raises(RequestTooLongError, match="has 50 tokens: the longest sequence is 50"):
        scheduler.add(make_request("long", 50))
    small, _ = pair(CacheCapacity(5, 1, 4), type=policy)
    with pytest.raises(RequestTooLongError, match=r"has 21 tokens: the whole cache holds 20 \(5 rows\)"):
        small.add(make_request("large", 21))
    assert not scheduler.has_work and not small.has_work


@pytest.mark.parametrize("policy", SCHEDULERS)
def test_an_output_longer_than_there_is_room_for_ends_with_length(policy: str) -> None:
    for capacity, limit in ((WIDE, 30), (CacheCapacity(4, 1, 4), 17)):
        scheduler, worker = pair(capacity, max_len=30, type=policy)
        request = make_request("r", 9, max_tokens=None, ignore_eos=True)
        scheduler.add(request)
        run_to_end(scheduler, worker)
        assert request.finish_reason == "length" and request.num_tokens == limit
        assert request.output_token_ids == expected_output(request, limit)[0]


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    scheduler, worker = pair()
    scheduler.add(make_request("r", 5, 1))
    with pytest.raises(ValueError, match="'r' belongs to a request that has not ended"):
        scheduler.add(make_request("r", 5))
    out = scheduler.schedule()
    result = worker.execute(out)
    scheduler.finish("r", "abort")
    with pytest.raises(ValueError, match="has not ended"):
        scheduler.add(make_request("r", 5))
    worker.complete(out.step_id)
    scheduler.update(out, result)
    again = make_request("r", 7, 2)
    scheduler.add(again)
    run_to_end(scheduler, worker)
    assert again.output_token_ids == expected_output(again, 100)[0]


# Endings.


def test_what_ends_an_output() -> None:
    scheduler, worker = pair(max_len=400)
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    requests = []
    for i in range(40):
        stops = tuple(rng.sample(range(23), 2 if i else 0))  # nothing stops the first one
        least = rng.choice((0, 8))
        params = {"stop_token_ids": stops, "min_tokens": least, "ignore_eos": not i or rng.random() < 0.5}
        requests.append(make_request(f"{seed}-{i}", rng.randint(1, 9), 20, **params))
        scheduler.add(requests[-1])
    run_to_end(scheduler, worker)
    for request in requests:
        tokens, reason = expected_output(request, 400)
        assert (request.output_token_ids, request.finish_reason) == (tokens, reason)
        is_eos = tokens[-1] == EOS and not request.sampling_params.ignore_eos
        assert request.stop_reason == (tokens[-1] if reason == "stop" and not is_eos else None)
    assert {request.finish_reason for request in requests} == {"stop", "length"}


@pytest.mark.parametrize("policy", SCHEDULERS)
def test_abort_in_every_state_gives_all_memory_back(policy: str) -> None:
    scheduler, worker = pair(CacheCapacity(30, 1, 4), type=policy, max_num_seqs=2, chunk_size=8)
    requests = [make_request(f"r{i}", 20, 50, ignore_eos=True) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.finish("r3", "abort") and not scheduler.finish("r3", "abort")
    assert not scheduler.finish("nobody", "abort")
    step(scheduler, worker)
    assert scheduler.finish("r0", "abort")
    assert "r0" in step(scheduler, worker).finished
    out = scheduler.schedule()
    result = worker.execute(out)
    names = [chunk.request_id for chunk in out.chunks]
    for name in ("r1", "r2"):
        scheduler.finish(name, "abort")
    worker.complete(out.step_id)
    assert scheduler.update(out, result) == [], "an aborted request got a token"
    assert scheduler.block_space_manager.num_used_rows == 0
    last = scheduler.schedule()
    assert set(names) <= set(last.finished) and not last.chunks and not scheduler.has_work
    worker.execute(last)
    assert not worker.sequences
    assert all(request.finish_reason == "abort" for request in requests)


def test_requests_aborted_behind_one_that_cannot_start_are_forgotten() -> None:
    scheduler, worker = pair(max_num_seqs=1)
    kept = [make_request(f"kept{i}", 5, 3, ignore_eos=True) for i in range(8)]
    for i, request in enumerate(kept):
        scheduler.add(request)
        for j in range(200):
            scheduler.add(make_request(f"{i}.{j}", 5))
            scheduler.finish(f"{i}.{j}", "abort")
        step(scheduler, worker)
    assert len(scheduler._waiting._heap) <= 2 * len(kept)
    run_to_end(scheduler, worker)
    assert [request.output_token_ids for request in kept] == [expected_output(request, 100)[0] for request in kept]


def test_memory_of_a_step_in_flight_is_held_until_its_update() -> None:
    scheduler, worker = pair(CacheCapacity(6, 1, 4), max_num_seqs=1)
    scheduler.add(make_request("a", 20, ignore_eos=True))
    scheduler.add(make_request("b", 20, ignore_eos=True))
    first = scheduler.schedule()
    result = worker.execute(first)
    scheduler.finish("a", "abort")
    behind = scheduler.schedule()
    assert not behind.finished and not behind.chunks, "its slot and its rows are still in use"
    behind_result = worker.execute(behind)
    worker.complete(first.step_id)
    scheduler.update(first, result)
    worker.complete(behind.step_id)
    scheduler.update(behind, behind_result)
    out = scheduler.schedule()
    assert out.finished == ("a",) and [chunk.request_id for chunk in out.chunks] == ["b"]


def test_a_stop_string_found_outside_ends_a_request_and_drops_the_token_behind_it() -> None:
    scheduler, worker = pair()
    request = make_request("r", 5, 50, ignore_eos=True)
    scheduler.add(request)
    first = scheduler.schedule()
    result = worker.execute(first)
    second = scheduler.schedule()
    assert second.chunks[0].samples and second.chunks[0].start == 5, "decodes on a token it has not seen"
    second_result = worker.execute(second)
    worker.complete(first.step_id)
    assert scheduler.update(first, result) == [RequestUpdate("r", result.tokens)]
    assert scheduler.finish("r", "stop", "END")
    assert not scheduler.finish("r", "length"), "it has ended already"
    worker.complete(second.step_id)
    assert scheduler.update(second, second_result) == []
    assert (request.finish_reason, request.stop_reason, len(request.output_token_ids)) == ("stop", "END", 1)
    assert scheduler.schedule().finished == ("r",)


# Overlapped steps.


def test_steps_ahead_never_pass_max_tokens() -> None:
    scheduler, worker = pair()
    request = make_request("r", 5, 3, ignore_eos=True)
    scheduler.add(request)
    outs = [scheduler.schedule() for _ in range(6)]
    assert [len(out.chunks) for out in outs] == [1, 1, 1, 0, 0, 0]
    for out, result in [(out, worker.execute(out)) for out in outs]:
        worker.complete(out.step_id)
        scheduler.update(out, result)
    assert request.output_token_ids == expected_output(request, 100)[0]


def test_results_out_of_order_are_refused() -> None:
    scheduler, worker = pair()
    scheduler.add(make_request("r", 5, 3, ignore_eos=True))
    outs = [scheduler.schedule() for _ in range(2)]
    results = [worker.execute(out) for out in outs]
    with pytest.raises(ValueError, match="step 1 with result 1: the oldest in flight is 0"):
        scheduler.update(outs[1], results[1])


def test_a_result_that_lacks_a_token_is_refused() -> None:
    scheduler, worker = pair()
    for name in ("a", "b"):
        scheduler.add(make_request(name, 5, ignore_eos=True))
    out = scheduler.schedule()
    with pytest.raises(ValueError, match="step 0 has 1 tokens for 2 that were due"):
        scheduler.update(out, StepResult(0, worker.execute(out).tokens[:1]))


def test_tokens_are_matched_by_request_and_not_by_position() -> None:
    scheduler, worker = pair(chunk_size=8)
    requests = [make_request(f"r{i}", 3 + i, 6, ignore_eos=True) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        out = scheduler.schedule()
        result = worker.execute(out)
        worker.complete(out.step_id)
        scheduler.update(out, StepResult(out.step_id, tuple(reversed(result.tokens))))
    for request in requests:
        assert request.output_token_ids == expected_output(request, 100)[0]


# Progress, whatever was computed before.


def cached_pair(num_prompt: int, num_cached: int, **knobs: Any) -> tuple[Scheduler, Request]:
    """A scheduler in whose cache are the first num_cached tokens of the request."""
    scheduler, worker = pair(CacheCapacity(100, 1, 4, num_retained=4), **knobs)
    request = make_request("r", num_prompt, 4)
    first = Request("first", request.token_ids[:num_cached], SamplingParams(max_tokens=1))
    scheduler.add(first)
    run_to_end(scheduler, worker)
    scheduler.add(request)
    return scheduler, request


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    scheduler, _ = cached_pair(30, 30)
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.start, chunk.num_tokens, chunk.samples) == (29, 1, True)


def test_a_prefix_found_in_the_cache_moves_the_chunks_behind_it() -> None:
    scheduler, _ = cached_pair(30, 22, chunk_size=5)
    chunks = [scheduler.schedule().chunks[0] for _ in range(2)]
    assert [(chunk.start, chunk.num_tokens, chunk.samples) for chunk in chunks] == [(22, 5, False), (27, 3, True)]


@pytest.mark.parametrize("policy", SCHEDULERS)
def test_a_step_costs_in_proportion_to_its_requests(policy: str) -> None:
    """Counted in lines of Python run, which no busy machine can disturb."""
    lines = {}
    for num_running in (128, 256):
        knobs = {"max_num_seqs": num_running, "chunk_size": 4096}
        scheduler, worker = pair(CacheCapacity(300_000, 1, 16), 8192, type=policy, **knobs)
        for i in range(num_running):
            scheduler.add(make_request(f"r{i}", 8, 2000, ignore_eos=True))
        for _ in range(3):
            step(scheduler, worker)
        lines[num_running] = count_lines(scheduler, worker)
    assert lines[256] < 2.05 * lines[128]
    assert lines[256] / 256 < 40


def count_lines(scheduler: Scheduler, worker: FakeWorker) -> int:
    """Lines that a schedule and an update run."""
    num_lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
        nonlocal num_lines
        num_lines += event == "line"
        return count

    def traced(function: Callable[..., Any], *arguments: object) -> Any:
        before = sys.gettrace()
        sys.settrace(count)
        try:
            return function(*arguments)
        finally:
            sys.settrace(before)

    out = traced(scheduler.schedule)
    result = worker.execute(out)
    worker.complete(out.step_id)
    traced(scheduler.update, out, result)
    return num_lines
