"""Who gets memory, who gives it up, and what happens when there is less than was thought."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from dataclasses import replace

import pytest
from scheduler_simulation import FakeWorker, expected_output, make_pair, make_request, run_to_end, step

from sarathi.config.schema import SCHEDULERS, SchedulerConfig
from sarathi.core.scheduler import RequestTooLongError, Scheduler, memory_recovery
from sarathi.messages import CacheCapacity, RequestUpdate, SchedulerOutput, StepResult
from sarathi.request import RequestStatus

BACKENDS = ("sdpa_paged_4", "sdpa_vattn")
WIDE = CacheCapacity(1000, 1, 4)


def pair(capacity=WIDE, max_len=100, backend="sdpa_vattn", **knobs):
    return make_pair(SchedulerConfig(**knobs), backend, capacity, max_len)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", ["sarathi", "vllm", "simple_chunking"])
def test_the_oldest_goes_on_where_one_request_barely_fits(policy: str, backend: str) -> None:
    """Eight requests that each need the whole pool: every step of the oldest computes something."""
    scheduler, worker = pair(CacheCapacity(10, 1, 4), 100, backend, type=policy, chunk_size=16, watermark=0.0)
    requests = [make_request(f"r{i}", 6, 34, ignore_eos=True) for i in range(8)]
    for request in requests:
        scheduler.add(request)
    num_steps = 0
    while scheduler.has_work:
        oldest = next((request for request in requests if not request.is_finished), None)
        before = (oldest.num_computed_tokens, oldest.num_preemptions) if oldest else (0, 0)
        out = step(scheduler, worker)
        num_steps += 1
        if oldest is not None and before[0] and policy == "sarathi":
            assert oldest.num_computed_tokens > before[0] and oldest.num_preemptions == before[1]
        assert out.chunks or out.finished, "an idle step"
    assert scheduler.num_preemptions > 8
    assert num_steps < 8 * (34 * 2 + 6)
    for request in requests:
        assert request.output_token_ids == expected_output(request, 100)[0]


def test_the_oldest_goes_on_while_every_request_is_in_flight() -> None:
    """Three steps under way at any time, so that who should give way is always in one of them.

    The young one has its memory already and would go on for a hundred steps.
    """
    scheduler, worker = pair(CacheCapacity(308, 1, 1), max_len=400, chunk_size=5, watermark=0.0)
    old, young = make_request("old", 6, 34, ignore_eos=True), make_request("young", 300, 1)
    scheduler.add(old)
    scheduler.add(young)
    in_flight: deque[tuple[SchedulerOutput, StepResult]] = deque()
    waited = [0]
    while not old.is_finished:
        out = scheduler.schedule()
        in_flight.append((out, worker.execute(out)))
        waited.append(0 if "old" in {chunk.request_id for chunk in out.chunks} else waited[-1] + 1)
        if len(in_flight) == 3:
            out, result = in_flight.popleft()
            worker.complete(out.step_id)
            scheduler.update(out, result)
    assert max(waited) <= 4 and young.num_preemptions == 1


@pytest.mark.parametrize("rows", [31, 32])
def test_the_victim_is_who_has_computed_least_and_comes_back_before_the_others(rows: int) -> None:
    scheduler, worker = pair(CacheCapacity(rows, 1, 1), watermark=0.0)
    for name, num_prompt in (("first", 4), ("small", 5), ("large", 12), ("medium", 10)):
        scheduler.add(make_request(name, num_prompt, 20, ignore_eos=True))
    scheduler.add(make_request("later", 2, 20, ignore_eos=True))
    assert step(scheduler, worker).preempted == ()
    out = step(scheduler, worker)
    assert out.preempted == ("small",), "first is smaller still, but the oldest"
    assert not out.new_requests, "later takes what small had to give up"
    small = scheduler._waiting.first().request
    assert (small.status, small.num_computed_tokens, small.num_preemptions) == (RequestStatus.PREEMPTED, 0, 1)
    order = []
    while scheduler.has_work:
        order += [chunk.request_id for chunk in step(scheduler, worker).chunks if chunk.start == 0]
    assert order.index("small") < order.index("later")


def test_of_two_that_would_lose_as_much_the_younger_goes() -> None:
    scheduler, worker = pair(CacheCapacity(16, 1, 1), watermark=0.0)
    for i in range(3):
        scheduler.add(make_request(f"r{i}", 5, 20, ignore_eos=True))
    assert [step(scheduler, worker).preempted for _ in range(2)] == [(), ("r2",)]


def test_a_resumed_request_computes_prompt_and_output_again_and_is_not_introduced_again() -> None:
    scheduler, worker = pair(CacheCapacity(24, 1, 1), watermark=0.0)
    old, young = make_request("old", 8, 12, ignore_eos=True), make_request("young", 6, 9, ignore_eos=True)
    scheduler.add(old)
    scheduler.add(young)
    outputs = run_to_end(scheduler, worker)
    assert young.num_preemptions >= 1
    assert sum(len(out.new_requests) for out in outputs) == 2
    resumed = [chunk for out in outputs for chunk in out.chunks if chunk.request_id == "young" and chunk.start == 0]
    assert resumed[0].num_tokens == 6 and resumed[1].num_tokens > 6
    assert resumed[1].samples and resumed[1].granted_tokens >= resumed[1].num_tokens
    assert young.output_token_ids == expected_output(young, 100)[0]


def test_a_preemption_is_logged_with_what_it_cost(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, worker = pair(CacheCapacity(24, 1, 1), watermark=0.0)
    for name in ("old", "young"):
        scheduler.add(make_request(name, 10, 12, ignore_eos=True))
    with caplog.at_level(logging.WARNING, logger="sarathi"):
        run_to_end(scheduler, worker)
    message = caplog.records[0].getMessage()
    assert message == (
        "preempted request young: 12 computed tokens lost, preemption 1 of this request; 24 of 24 rows were in use"
    )


def test_admission_takes_memory_for_the_whole_prompt() -> None:
    scheduler, worker = pair(chunk_size=8)
    scheduler.add(make_request("r", 40, 2, ignore_eos=True))
    chunks = [step(scheduler, worker).chunks[0] for _ in range(6)]
    assert [chunk.granted_tokens for chunk in chunks] == [40] * 5 + [44]


@pytest.mark.parametrize("num_prompt", [10, 11])
def test_who_starts_beside_others_leaves_the_watermark_free(num_prompt: int) -> None:
    scheduler, worker = pair(CacheCapacity(100, 1, 1), max_len=1000, watermark=0.1)
    for name, length in (("alone", 40), ("beside", 40), ("last", num_prompt)):
        scheduler.add(make_request(name, length, 9, ignore_eos=True))
    admitted = [new.request_id for new in step(scheduler, worker).new_requests]
    assert admitted == ["alone", "beside", "last"][: 3 if num_prompt == 10 else 2]


@pytest.mark.parametrize("policy", SCHEDULERS)
def test_memory_lost_in_a_step_undoes_that_step_and_goes_on(policy: str) -> None:
    scheduler, worker = pair(CacheCapacity(30, 1, 4), type=policy, max_len=30, chunk_size=16, watermark=0.0)
    requests = [make_request(f"r{i}", 10, 15, ignore_eos=True) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    for _ in range(3):
        step(scheduler, worker)
    progress = [(request.num_computed_tokens, request.output_token_ids) for request in requests]
    worker.rows = worker.held_rows() - 1
    out = scheduler.schedule()
    result = worker.execute(out)
    assert result.available_rows == worker.rows and not result.tokens
    worker.complete(out.step_id)
    scheduler.update(out, result)
    assert [(request.num_computed_tokens, request.output_token_ids) for request in requests] == progress
    assert scheduler.block_space_manager.capacity.rows == worker.rows
    run_to_end(scheduler, worker)
    assert scheduler.num_preemptions > 0
    for request in requests:
        assert request.output_token_ids == expected_output(request, 30)[0]


def test_steps_sent_behind_a_failed_one_are_undone_with_it() -> None:
    scheduler, worker = pair(CacheCapacity(30, 1, 4), watermark=0.0)
    requests = [make_request(f"r{i}", 10, 15, ignore_eos=True) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    step(scheduler, worker)
    worker.rows = worker.held_rows() - 1
    sent = [scheduler.schedule() for _ in range(3)]
    results = [worker.execute(out) for out in sent]
    assert all(result.available_rows is not None for result in results)
    for out, result in zip(sent, results, strict=True):
        worker.complete(out.step_id)
        scheduler.update(out, result)
        assert [request.num_computed_tokens for request in requests] == [10, 10, 10]
    run_to_end(scheduler, worker)
    for request in requests:
        assert request.output_token_ids == expected_output(request, 100)[0]


def test_sequences_that_a_failed_step_was_to_copy_from_are_given_up() -> None:
    """The worker may have released or renamed them before its memory ran out."""
    scheduler, worker = pair(CacheCapacity(30, 1, 4, num_retained=4), watermark=0.0)
    first = make_request("first", 40, 1)
    scheduler.add(first)
    run_to_end(scheduler, worker)
    assert scheduler.block_space_manager.stats.num_retained_rows == 10
    second = replace(make_request("second", 30, 2), token_ids=first.token_ids[:22] + array("q", range(8)))
    scheduler.add(second)
    worker.rows = 12
    out = scheduler.schedule()
    assert out.prefixes.shared
    scheduler.update(out, worker.execute(out))
    worker.complete(out.step_id)
    assert scheduler.block_space_manager.stats.num_retained_rows == 0
    run_to_end(scheduler, worker)
    assert second.output_token_ids == expected_output(second, 100)[0]


def test_a_worker_that_fails_though_memory_suffices_does_not_stop_the_others() -> None:
    """It says that there is plenty, and fails all steps of more than one request: in the end one runs at a time."""
    scheduler, worker = pair(CacheCapacity(30, 1, 4), watermark=0.0)
    requests = [make_request(f"r{i}", 10, 15, ignore_eos=True) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    for _ in range(200):
        out = scheduler.schedule()
        if len(out.chunks) > 1:
            worker.rows = 0
        result = worker.execute(out)
        worker.rows = 30
        if result.available_rows is not None:
            result = StepResult(out.step_id, available_rows=10**6)
        worker.complete(out.step_id)
        scheduler.update(out, result)
    assert not scheduler.has_work
    for request in requests:
        assert request.output_token_ids == expected_output(request, 21)[0], "five rows of four are left"


def shrink(scheduler: Scheduler, worker: FakeWorker, rows: int) -> set[tuple[str, str | None]]:
    """A step that finds only this many rows; returns the requests that it ended, with reasons."""
    worker.rows = rows
    out = scheduler.schedule()
    result = worker.execute(out)
    assert result.available_rows == rows
    worker.complete(out.step_id)
    updates = scheduler.update(out, result)
    assert not any(update.tokens for update in updates)
    return {(update.request_id, update.finish_reason) for update in updates}


def test_what_runs_and_no_longer_fits_a_smaller_cache_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, worker = pair(CacheCapacity(40, 1, 1), watermark=0.0)
    grown, new = make_request("grown", 10, 20, ignore_eos=True), make_request("new", 20, 5)
    scheduler.add(grown)
    for _ in range(5):
        step(scheduler, worker)
    scheduler.add(new)
    assert shrink(scheduler, worker, 12) == {("grown", "length"), ("new", "error")}
    assert (grown.finish_reason, len(grown.output_token_ids)) == ("length", 5)
    assert (new.finish_reason, new.output_token_ids) == ("error", [])
    assert (
        "request new ended with reason error: it has 20 tokens, and the cache has room for 12 (12 rows)" in caplog.text
    )
    run_to_end(scheduler, worker)
    assert not worker.sequences


@pytest.mark.parametrize("policy", SCHEDULERS)
def test_what_waits_is_only_refused_or_ended_by_the_full_cache(policy: str) -> None:
    """It waits for those that run, and is not held up by a shortage that was over long ago."""
    scheduler, worker = pair(CacheCapacity(40, 1, 1), type=policy, watermark=0.0)
    running = [make_request(name, 5, 6, ignore_eos=True) for name in "ab"]
    waiting = [make_request(name, 35, 4, ignore_eos=True) for name in "cd"]
    for request in [*running, waiting[0]]:
        scheduler.add(request)
    for _ in range(2):
        step(scheduler, worker)
    assert shrink(scheduler, worker, 12) == set()
    scheduler.add(waiting[1])
    with pytest.raises(RequestTooLongError, match=r"has 41 tokens: the whole cache holds 40 \(40 rows\)"):
        scheduler.add(make_request("never", 41))
    while not all(request.is_finished for request in running):
        step(scheduler, worker)
        assert scheduler.block_space_manager.capacity.rows == 12 and scheduler.num_waiting >= 2
    worker.rows = 40
    run_to_end(scheduler, worker, max_steps=40)
    for request in (*running, *waiting):
        assert request.output_token_ids == expected_output(request, 100)[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("policy", SCHEDULERS)
def test_a_shortage_that_does_not_pass_ends_what_cannot_run(policy: str, depth: int) -> None:
    """Each of these asks for the full cache again, finds a part of it, and must not try for ever."""
    scheduler, worker = pair(CacheCapacity(40, 1, 1), type=policy, watermark=0.0)
    worker.rows = 12
    requests = [make_request(f"r{i}", length, 8, ignore_eos=True) for i, length in enumerate((3, 35, 6, 20, 13, 12))]
    for request in requests:
        scheduler.add(request)
    in_flight: deque[tuple[SchedulerOutput, StepResult]] = deque()
    num_steps = 0
    while scheduler.has_work or in_flight:
        num_steps += 1
        if scheduler.has_work:
            out = scheduler.schedule()
            in_flight.append((out, worker.execute(out)))
        if len(in_flight) == depth or not scheduler.has_work:
            out, result = in_flight.popleft()
            worker.complete(out.step_id)
            scheduler.update(out, result)
            scheduler.check_integrity()
        assert num_steps < 400
    assert [request.finish_reason for request in requests] == ["length", "error", "length", "error", "error", "length"]
    assert [request.num_output_tokens for request in requests] == [8, 0, 7, 0, 0, 1]


def test_memory_that_was_short_for_a_moment_is_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_recovery, "_RETRY_STEPS", 5)
    scheduler, worker = pair(CacheCapacity(40, 1, 1), watermark=0.0)
    requests = [make_request(name, 10, 20, ignore_eos=True) for name in ("a", "b")]
    for request in requests:
        scheduler.add(request)
    step(scheduler, worker)
    worker.rows = 18
    step(scheduler, worker)
    worker.rows = 40
    for _ in range(5):
        step(scheduler, worker)
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.block_space_manager.capacity.rows) == (1, 1, 18)
    step(scheduler, worker)
    step(scheduler, worker)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.block_space_manager.capacity.rows) == (2, 0, 40)
    run_to_end(scheduler, worker)
    for request in requests:
        assert request.output_token_ids == expected_output(request, 100)[0]


def test_a_request_that_finds_nobody_there_finds_all_memory() -> None:
    scheduler, worker = pair(CacheCapacity(40, 1, 1), watermark=0.0)
    scheduler.add(make_request("a", 10, 20, ignore_eos=True))
    worker.rows = 0
    run_to_end(scheduler, worker)
    assert scheduler.block_space_manager.capacity.rows == 0
    worker.rows = 40
    late = make_request("late", 10, 20, ignore_eos=True)
    scheduler.add(late)
    run_to_end(scheduler, worker)
    assert late.output_token_ids == expected_output(late, 100)[0]


def test_a_cache_of_another_size_lets_others_run_and_stays_that_size() -> None:
    scheduler, worker = pair(CacheCapacity(12, 1, 1), watermark=0.0)
    for name in ("a", "b"):
        scheduler.add(make_request(name, 10, 5, ignore_eos=True))
    step(scheduler, worker)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    worker.rows = 40
    assert scheduler.resize(40) == []
    step(scheduler, worker)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)
    run_to_end(scheduler, worker)
    scheduler.add(make_request("c", 10, 5, ignore_eos=True))
    assert scheduler.block_space_manager.capacity.rows == 40


def test_a_cache_that_is_smaller_for_good_ends_who_waits_too() -> None:
    scheduler, worker = pair(CacheCapacity(40, 1, 1), max_num_seqs=1)
    requests = [make_request(f"r{length}", length, 5, ignore_eos=True) for length in (20, 10, 30)]
    for request in requests:
        scheduler.add(request)
    step(scheduler, worker)
    assert scheduler.resize(15) == [RequestUpdate("r20", (), "length"), RequestUpdate("r30", (), "error")]
    run_to_end(scheduler, worker)
    assert [request.finish_reason for request in requests] == ["length", "length", "error"]
